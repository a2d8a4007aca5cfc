"""``python -m httpx_p2pcache`` is the command ``p2pcache``."""

from httpx_p2pcache.cli import main

main()
