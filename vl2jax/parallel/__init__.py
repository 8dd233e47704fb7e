"""Parallelism: device meshes, sharding rules, and runs of several processes.

Imports only `common`; it depends on the model only through the names of parameters.  Start with
`sharding.py`, whose tables give the sharding of each parameter and cache.
"""
