from httpx_p2pcache.cli import main

main()
