"""The main job: finetune a GPT-2 on PG-19 with recurrence and without, and compare them.

python run_pg19.py --window 256
python run_pg19.py --window 256 --model gpt2 --data pg19 --steps 20000 --eval-tokens 0    # at the paper's scale
"""

import argparse
import sys

from recur_gpt2.cli import finetune
from recur_gpt2.cli.process import guarded
from recur_gpt2.utils.thread_cache import restart_tuned

if __name__ == "__main__":
    restart_tuned()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    finetune.add_arguments(parser)
    args = parser.parse_args()
    sys.exit(guarded(lambda: finetune.run(args, name="pg19")))
