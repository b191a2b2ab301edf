"""Does one training after the other in the same two processes, two ranks: starting them takes longer than training.

python tests/trainings_of_ranks.py FLAGS...        each a JSON list, the command line of one brn-train
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

from brn_core.worker.ranks import Rank, launch


def main(*trainings: str) -> int:
    rank = Rank.from_environment(os.environ)
    if rank is None:
        return launch([sys.executable, *sys.argv], 2)
    from brn_core.worker.settings import parse_settings
    from brn_core.worker.train import train

    for number, flags in enumerate(trainings):
        train(parse_settings(json.loads(flags)), replace(rank, rendezvous=f"{rank.rendezvous}-{number}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
