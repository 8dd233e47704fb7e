"""Many devices and many processes: the mesh in force, the sharding rules, processes of one run.

Imports `common` alone; it knows a model only by the names of its parameters.  Start with
`sharding.py`, whose tables say where every parameter and cache lies.
"""
