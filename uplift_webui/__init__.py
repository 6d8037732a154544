"""UPLiFT in the Stable Diffusion WebUI family: AUTOMATIC1111, reForge, Forge, Forge Classic and Forge Neo.

``scripts/uplift_hires.py`` is what the host loads; it hands every hook on to this package. Nothing here imports the
host at its top, so that one process can hold the package while the host reloads its scripts. What differs between the
hosts is settled in :mod:`uplift_webui.hosts`.
"""
