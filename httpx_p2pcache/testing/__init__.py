"""What tests of this package need, public because tests of yours may need it as well."""

from httpx_p2pcache.testing.origin import Origin, Resource, from_har, github_etag, made_up, targets_of

__all__ = ["Origin", "Resource", "from_har", "github_etag", "made_up", "targets_of"]
