"""One module a command of `flowrl`; cli.py parses, these do."""
