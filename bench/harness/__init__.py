"""What every verb uses: clocks and peak memory, devices, tables and figures, progress. Imports no other room."""
