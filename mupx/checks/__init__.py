"""Verification: lint, coordinate check, curvature orders, sweeps over width, late check, one verdict.

:func:`mupx.checks.runner.verify` runs all of it; each part is a file of its own.
"""
