"""``python -m reclip_d2.fetch``."""

from reclip_d2.fetch.program import main

if __name__ == "__main__":
    main()
