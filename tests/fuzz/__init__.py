# SPDX-License-Identifier: Apache-2.0
"""Fuzz targets, their kept inputs, and the tests that replay them. docs/hacking.md."""
