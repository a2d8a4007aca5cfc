"""One daemon per runner: its node for every process of this package, and a door for every other HTTP client.

``life`` starts, finds and stops it, ``door`` is the cache as a plain HTTP server, ``control`` what it says of itself.
"""
