"""``python -m piadm``, which is how torchrun starts it."""

import sys

if __name__ == "__main__":
    from piadm.cli.app import main

    sys.exit(main())
