"""``softprompt-fast`` for scripts in tests: commands are forked from one process, so that they start at once.

``serve`` runs in that process, which has imported everything; ``call`` is what the script starts.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from importlib import import_module

IMPORTED = ("softprompt_fast.tuning.training_loop", "softprompt_fast.registry.prompt_registry", "mlflow", "datasets")


def serve(address: str) -> None:
    """Runs each command that a client sends, in a process of its own with the client's files, folder and variables."""
    main = import_module("softprompt_fast.cli").main
    for name in IMPORTED:
        import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            client, _ = listener.accept()
            message, files, *_ = socket.recv_fds(client, 1 << 20, 3)
            child = os.fork()
            if child == 0:
                for number, file in enumerate(files):
                    os.dup2(file, number)
                words, folder, variables = json.loads(message)
                os.chdir(folder)
                os.environ.update(variables)
                sys.argv = ["softprompt-fast", *words]
                try:
                    main()
                except SystemExit as end:
                    sys.stdout.flush()
                    os._exit(int(end.code or 0))
            for file in files:
                os.close(file)
            client.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255]))
            client.close()


def call(address: str, *words: str) -> int:
    """Sends a command and waits for its status."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        message = json.dumps([words, os.getcwd(), dict(os.environ)])
        socket.send_fds(server, [message.encode()], [0, 1, 2])
        return (server.recv(1) or b"\1")[0]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(*sys.argv[2:]))
