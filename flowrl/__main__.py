"""`flowrl ...`, and `python -m flowrl ...` for torchrun."""

import os
import traceback

from flowrl.cli import main


def run() -> None:
    """`main` as a process of its own."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return main()
    from flowrl.parallel import leave

    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    run()
