"""An engine on another node, over TCP on this one: who is let in, and how it ends.

vLLM's place is taken by a small engine behind the real server; with vLLM: tests/with_vllm.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flowrl.rollout import engine_remote
from flowrl.rollout.engine_listener import EngineListener
from flowrl.rollout.engine_process import ServerProcess
from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    EngineSettings,
    Message,
)
from flowrl.rollout.engine_remote import RemoteServer
from flowrl.rollout.engine_token import (
    MAGIC,
    TOKEN_VARIABLE,
    HandshakeError,
    admit,
    present,
    read_token,
)
from flowrl.rollout.process_tree import group_members
from flowrl.rollout_config import RolloutConfig, split_address
from flowrl.schema import ConfigError

TOKEN = b"0123456789abcdef"
ENGINE = """
import os, signal, socket, sys, time
from flowrl.rollout.engine_protocol import EngineSettings, Message
from flowrl.rollout.engine_server import serve

class Engine:
    def ready(self):
        return Message("ready", {"folder": ""})

    def answer(self, message):
        if message.op == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if message.op == "sleep":
            time.sleep(300)
        if message.op == "fail":
            raise ValueError("no such thing")
        fields = {"pid": os.getpid(), "config": settings.model_config, "device": settings.device}
        fields["secrets"] = [k for k in os.environ if "TOKEN" in k and "FLOWRL" in k]
        return Message("echo", fields, message.arrays)

settings = EngineSettings.from_json(sys.argv[4])
print("the engine is up", flush=True)
if os.fork() == 0:
    time.sleep(300)  # as vLLM's core: a process that outlives its server
serve(socket.socket(fileno=int(sys.argv[3])), Engine())
"""


@pytest.fixture
def python(tmp_path):
    code = tmp_path / "engine.py"
    code.write_text(ENGINE)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exec {sys.executable} {code} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def listener(python, tmp_path):
    listener = EngineListener("127.0.0.1:0", TOKEN, python, tmp_path / "serve.log")
    thread = threading.Thread(target=listener.serve, daemon=True)
    thread.start()
    yield listener
    listener.close()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    return EngineSettings(model_dir=str(tmp_path), log_path="")


def connect(listener, settings, limit_s=30.0, token=TOKEN):
    return RemoteServer(f"127.0.0.1:{listener.port}", token, settings, limit_s)


def ask(host, op="echo", limit_s=30.0, **arrays):
    return host.call(Message(op, {}, arrays), limit_s)


# --- the token


def shake_hands(client, server_token=TOKEN, limit_s=5.0):
    """What both sides of a handshake raise."""
    left, right = socket.socketpair()
    raised = []

    def serve():
        with right:
            try:
                admit(right, server_token, time.monotonic() + limit_s)
            except (OSError, EOFError) as error:
                raised.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    with left:
        try:
            client(left)
            found = None
        except OSError as error:
            found = error
        thread.join()
    return found, raised[0] if raised else None


def with_token(token):
    return lambda connection: present(connection, token, time.monotonic() + 5)


def test_both_sides_must_know_the_token():
    assert shake_hands(with_token(TOKEN)) == (None, None)
    client, server = shake_hands(with_token(b"another token ..."))
    assert isinstance(client, HandshakeError)
    assert "does not accept this token" in str(client)
    assert isinstance(server, HandshakeError)


def test_a_handshake_that_was_overheard_opens_nothing():
    heard = []

    class Tapped(socket.socket):
        def sendall(self, data, *flags):
            heard.append(bytes(data))
            return super().sendall(data, *flags)

    def tapped(connection):
        present(Tapped(fileno=os.dup(connection.fileno())), TOKEN, time.monotonic() + 5)

    assert shake_hands(tapped) == (None, None)
    replayed = b"".join(heard)
    assert len(replayed) == 64
    _, server = shake_hands(lambda connection: connection.sendall(replayed))
    assert isinstance(server, HandshakeError)


def test_a_server_that_does_not_know_the_token_gets_nothing():
    left, right = socket.socketpair()
    with left, right:
        right.sendall(MAGIC + bytes(32) + bytes(32))
        with pytest.raises(HandshakeError, match="does not know the token"):
            present(left, TOKEN, time.monotonic() + 5)
    left, right = socket.socketpair()
    with left, right:
        right.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 3)
        with pytest.raises(HandshakeError, match="is no flowrl serve"):
            present(left, TOKEN, time.monotonic() + 5)


def test_a_stranger_who_says_nothing_is_not_waited_for():
    _, server = shake_hands(lambda connection: connection.recv(999), limit_s=0.2)
    assert isinstance(server, TimeoutError)


def test_a_token_must_be_there_and_long(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r"FLOWRL_ENGINE_TOKEN has none; make one with"):
        read_token("")
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(ConfigError, match="at least 16 bytes, got 5"):
        read_token("")
    monkeypatch.setenv(TOKEN_VARIABLE, "x" * 16)
    assert read_token("") == b"x" * 16
    (tmp_path / "token").write_text("y" * 20 + "\n")
    assert read_token(str(tmp_path / "token")) == b"y" * 20


# --- engines


def test_an_engine_serves_its_trainer(listener, settings, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN.decode())
    host = connect(listener, settings)
    sent = np.arange(3_000_000, dtype=np.int32)  # more than the sockets buffer
    reply = ask(host, weights=sent)
    np.testing.assert_array_equal(reply.arrays["weights"], sent)
    assert reply.fields["config"] == '{"model_type": "qwen3"}'  # there is no shared directory
    assert reply.fields["secrets"] == []
    with pytest.raises(EngineRefusedError, match="fail: ValueError: no such thing"):
        ask(host, "fail")
    group = ask(host).fields["pid"]
    assert len(group_members(group)) == 2
    host.close()
    wait_until(lambda: not group_members(group))


def test_one_trainer_after_another(listener, settings):
    first = connect(listener, settings)
    came = []
    second = threading.Thread(target=lambda: came.append(connect(listener, settings)))
    second.start()
    time.sleep(1.5)
    assert not came
    old = ask(first).fields["pid"]
    first.close()
    second.join(20)
    assert ask(came[0]).fields["pid"] != old
    assert group_members(old) == []
    came[0].close()


def test_a_server_that_stays_busy_says_with_whom(listener, settings, monkeypatch):
    monkeypatch.setattr(engine_remote, "REACH_LIMIT_S", 1.0)
    first = connect(listener, settings)
    with pytest.raises(EngineError, match=r"serves another trainer, 127\.0\.0\.1:\d+, since"):
        connect(listener, settings)
    first.close()


TRAINER = """
import sys
from flowrl.rollout.engine_protocol import EngineSettings, Message
from flowrl.rollout.engine_remote import RemoteServer
host = RemoteServer(sys.argv[1], sys.argv[2].encode(), EngineSettings(sys.argv[3], ""), 30)
print(host.call(Message("echo"), 30).fields["pid"], flush=True)
host.call(Message("sleep"), 300)
"""


def test_a_trainer_that_is_killed_frees_the_server(listener, settings):
    address = f"127.0.0.1:{listener.port}"
    command = [sys.executable, "-c", TRAINER, address, TOKEN.decode(), settings.model_dir]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    group = int(trainer.stdout.readline())
    assert group_members(group)
    trainer.kill()  # while its engine is at work
    trainer.wait()
    connect(listener, settings).close()
    assert group_members(group) == []


def test_an_engine_that_dies_ends_the_call_with_its_logs_tail(listener, settings):
    host = connect(listener, settings)
    group = ask(host).fields["pid"]
    began = time.monotonic()
    with pytest.raises(
        EngineError, match=r"127.0.0.1:\d+ died during die \(signal 9\).*ends: the engine is up"
    ):
        ask(host, "die")
    assert time.monotonic() - began < 10
    assert group_members(group) == []
    connect(listener, settings).close()  # the next one finds it free


def test_an_engine_that_does_not_answer_is_killed(listener, settings):
    host = connect(listener, settings)
    group = ask(host).fields["pid"]
    with pytest.raises(EngineError, match=r"waited 0.5 s for vLLM server at .* to answer sleep"):
        ask(host, "sleep", limit_s=0.5)
    wait_until(lambda: not group_members(group))


def test_a_server_that_dies_ends_the_call(python, settings, tmp_path):
    """`flowrl serve` itself is killed: its engine ends with it."""
    env = {**os.environ, TOKEN_VARIABLE: TOKEN.decode()}
    command = [sys.executable, "-m", "flowrl", "serve", "127.0.0.1:0", "--python", python]
    command += ["--log", str(tmp_path / "log")]
    server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    address = line.split()[5].removesuffix(";")
    host = RemoteServer(address, TOKEN, settings, 30.0)
    group = ask(host).fields["pid"]
    threading.Timer(0.5, server.kill).start()
    began = time.monotonic()
    # Here the engine is a stand-in that does not watch its parent, so the test ends it.
    threading.Timer(1.0, lambda: [os.kill(pid, 9) for pid in group_members(group)]).start()
    with pytest.raises(EngineError, match="died during sleep .nobody answers there.*out of reach"):
        ask(host, "sleep", limit_s=60)
    assert time.monotonic() - began < 20
    server.wait()


def test_a_server_that_is_ended_ends_its_engine(python, settings, tmp_path):
    listener = EngineListener("127.0.0.1:0", TOKEN, python, tmp_path / "serve.log")
    threading.Thread(target=listener.serve, daemon=True).start()
    group = ask(connect(listener, settings)).fields["pid"]
    listener.close()
    assert group_members(group) == []


def test_a_wrong_token_is_refused_at_once(listener, settings, capsys):
    with pytest.raises(ConfigError, match=r"does not accept this token; set rollout.server_addr"):
        connect(listener, settings, token=b"another token ...")
    wait_until(lambda: "it does not know the token" in capsys.readouterr().err)


def test_nobody_there_is_an_error_with_a_remedy(settings, monkeypatch):
    monkeypatch.setattr(engine_remote, "REACH_LIMIT_S", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=r"cannot be reached .*start `flowrl serve 127"):
        RemoteServer(address, TOKEN, settings, 30.0)
    with pytest.raises(ConfigError, match=r"no host of that name in nowhere\.invalid:1"):
        RemoteServer("nowhere.invalid:1", TOKEN, settings, 30.0)


def test_a_server_listens_at_its_own_interface_alone(listener):
    with socket.create_connection(("127.0.0.1", listener.port), 5) as connection:
        assert connection.recv(len(MAGIC)) == MAGIC
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", listener.port), 5)
    with pytest.raises(ConfigError, match="cannot listen at .*give an address of this machine"):
        EngineListener(f"127.0.0.1:{listener.port}", TOKEN, "", Path("log"))


def test_another_version_is_refused(listener, settings, monkeypatch):
    monkeypatch.setattr(
        engine_remote,
        "_start_message",
        lambda settings: Message("start", {"flowrl": "0.0.0", "settings": settings.to_json()}),
    )
    with pytest.raises(EngineRefusedError, match="this is 0.0.0; install one"):
        connect(listener, settings)


def wait_until(condition, limit_s=15.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_local_server_gets_no_token(python, settings, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN.decode())
    here = EngineSettings(model_dir=settings.model_dir, log_path=str(tmp_path / "log"))
    host = ServerProcess(here, python, 30.0)
    assert ask(host).fields["secrets"] == []
    host.close()


# --- settings


@pytest.mark.parametrize("address", ["node1", "node1:", ":8577", "node1:http", "node1:70000", ""])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        RolloutConfig(engine="vllm", server_address=(address,))
    assert split_address("[::1]:8577") == ("::1", 8577)


@pytest.mark.parametrize(
    "options",
    [
        {"server_python": "python3"},
        {"mode": "in_process"},
        {"sync_transport": "ipc"},
        {"server_address": ("a:1", "a:1")},
        {"engine": "hf"},
        {"server_address": (), "server_token_file": "token"},
    ],
)
def test_settings_that_do_not_go_with_an_address_are_refused(options):
    with pytest.raises(ConfigError, match="rollout"):
        RolloutConfig(**{"engine": "vllm", "server_address": ("a:1",), **options})


def test_every_replica_has_an_address():
    config = RolloutConfig(engine="vllm", server_address=("a:1", "b:1"))
    assert [config.address_of(i, 2) for i in (0, 1)] == ["a:1", "b:1"]
    assert RolloutConfig(engine="vllm").address_of(3, 4) == ""
    with pytest.raises(ConfigError, match="got 2 and 4 replicas; start 4 times flowrl serve"):
        config.address_of(0, 4)
