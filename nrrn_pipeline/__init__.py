"""Denoise whole FIB-SEM volumes with NRRN."""
