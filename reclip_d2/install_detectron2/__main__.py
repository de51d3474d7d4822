"""``python -m reclip_d2.install_detectron2``."""

import sys

from reclip_d2.install_detectron2.program import main

if __name__ == "__main__":
    sys.exit(main())
