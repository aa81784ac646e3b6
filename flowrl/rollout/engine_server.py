"""The engine as a process of its own: answers one trainer over an inherited socket.

    python -m flowrl.rollout.engine_server FD SETTINGS_JSON     (started by a sampler)

It ends when the connection closes, and kills its whole process group when its parent is gone.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import traceback

from flowrl.rollout.engine_protocol import (
    EngineError,
    EngineRefusedError,
    EngineSettings,
    Message,
    receive,
    send,
)
from flowrl.rollout.owned_folder import remove_owned
from flowrl.rollout.process_tree import kill_group
from flowrl.rollout.vllm_engine import VLLMEngine
from flowrl.rollout.vllm_worker import watch_parent


def serve(connection: socket.socket, engine: VLLMEngine) -> None:
    """Answers until the connection closes or asks to stop."""
    send(connection, engine.ready(), math.inf)
    while True:
        try:
            message = receive(connection, math.inf)
        except (EOFError, OSError):
            return
        if message.op == "stop":
            return
        try:
            reply = engine.answer(message)
        except EngineError as error:
            send(connection, Message("dead", {"message": str(error)}), math.inf)
            return
        except (EngineRefusedError, ValueError, RuntimeError, TypeError, KeyError) as error:
            traceback.print_exc()  # into the log
            text = f"{message.op}: {type(error).__name__}: {error}"
            reply = Message("refused", {"message": text})
        send(connection, reply, math.inf)


def _follow_parent() -> None:
    """Ends the group. A folder that is written to meanwhile is left to the next engine."""
    remove_owned()
    kill_group(os.getpid())


def main() -> None:
    if os.getpgid(0) == os.getpid():  # a group of its own: nobody else is hit
        watch_parent(_follow_parent)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)  # else the core would hold it open after this process's death
    settings = EngineSettings.from_json(sys.argv[2])
    try:
        engine = VLLMEngine(settings)
    except EngineRefusedError as error:
        send(connection, Message("refused", {"message": str(error)}), math.inf)
        raise SystemExit(1) from error
    try:
        serve(connection, engine)
    finally:
        engine.close()


if __name__ == "__main__":  # vLLM spawns its core, which imports this module again
    main()
