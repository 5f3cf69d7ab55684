"""Shard sets on a server: http, https and object stores, with a cache on disk.

| module | what |
|---|---|
| `address.py` | a folder or a URL of the list of allowed schemes; a URL without what is secret in it |
| `web.py`, `timed.py` | one request over http or https, on a socket that keeps a deadline |
| `bucket.py` | one request to s3, gs, az or abfs, through fsspec |
| `fetch.py` | requests until the bytes are there, or until it is clear that they will not be |
| `cache.py` | bytes on disk, bounded, shared by the processes of one machine |
| `source.py` | a set on a server: manifest, index and checksums, and what all reading shares |
| `folder.py` | its files, in place of those of a local folder; a clip out of cache or server |
"""
