# SPDX-License-Identifier: Apache-2.0
"""Bytes in, values out: one file per format. No I/O, threads, logs, clock or configuration.

Any input is answered with a value or formats.errors.FormatError. docs/formats/ describes the bytes.
"""
