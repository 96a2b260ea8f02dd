# SPDX-License-Identifier: Apache-2.0
"""The test suite; a package, so that tests share tests.requires, tests.oracle and tests.fakes."""
