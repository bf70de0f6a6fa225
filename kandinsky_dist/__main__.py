"""Entry point of `python -m kandinsky_dist` (and so of torchrun, accelerate launch and deepspeed)."""

import sys

from kandinsky_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
