"""Speed and memory of a training step over batch sizes and precisions:  python benchmarks/gpu/speed.py OUT.csv"""

import argparse
from pathlib import Path

from viewdiff_nb.studies.adaptation import FULL, load_split
from viewdiff_nb.studies.benchmark import machine, speed_and_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512, 2048, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    table = speed_and_memory(load_split(FULL).train, batch_sizes=tuple(arguments.batches), rounds=arguments.rounds)
    table["machine"] = machine()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out, index=False)
    print(table.drop(columns="machine").round(3).to_string())


if __name__ == "__main__":
    main()
