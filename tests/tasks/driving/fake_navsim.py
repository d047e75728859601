"""A scorer process without the devkit: the server's own protocol around made-up numbers.

    python fake_navsim.py DESCRIPTOR BEHAVIOUR FOLDER

Each request is recorded in FOLDER/requests.jsonl; FOLDER/starts has a line for each process.
"""

import importlib.util
import json
import os
import socket
import sys
import time
from pathlib import Path

SERVER = Path(__file__).parents[3] / "rlalign/tasks/driving/navsim_server.py"


def load_server():
    spec = importlib.util.spec_from_file_location("navsim_server", SERVER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(descriptor: str, behaviour: str, folder: str) -> None:
    server, here = load_server(), Path(folder)
    with (here / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    first = len((here / "starts").read_text().splitlines()) == 1

    def score(request):
        with (here / "requests.jsonl").open("a") as log:
            log.write(json.dumps(request) + "\n")
        if behaviour == "dies" or (behaviour == "dies once" and first):
            print("segmentation fault, say")
            os._exit(3)
        if behaviour == "hangs" or (behaviour == "hangs once" and first):
            time.sleep(60)
        if behaviour == "fails":
            raise KeyError(request["token"])
        plans = request["poses"]
        ends = [plan[-1][0] / 100 for plan in plans]
        columns = {name: [1.0] * len(plans) for name in ("nc", "dac", "ttc", "comfort")}
        steps = {f"{name}_steps": [[1.0] * 41 for _ in plans] for name in ("nc", "dac", "ttc")}
        reply = {**columns, "progress": ends, "pdms": ends, **steps}
        if behaviour == "too few":
            reply["pdms"] = ends[:-1]
        if behaviour == "per cent":
            reply["pdms"] = [100 * end for end in ends]
        if behaviour == "forgets":
            del reply["ttc_steps"]
        return reply

    metric = "epdms-v2" if behaviour == "another metric" else "pdms-v1.1"
    if behaviour == "does not start":
        sys.exit("No module named 'navsim'")
    server.serve(socket.socket(fileno=int(descriptor)), metric, score)


if __name__ == "__main__":
    main(*sys.argv[1:])
