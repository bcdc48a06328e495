"""Windows, axes, schedules and grids: integers and names only, no torch."""
