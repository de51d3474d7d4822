"""``python -m reclip_d2``: the same as the command ``reclip``."""

from reclip_d2.cli.main import main

if __name__ == "__main__":
    main()
