"""One node for all processes of a runner: they reach it by a Unix socket, and never import libp2p.

``server`` offers any :class:`~httpx_p2pcache.network.PeerNetwork` on a socket, ``client`` is the same contract at the
other end, ``protocol`` is what they say to each other.
"""
