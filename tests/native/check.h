/* SPDX-License-Identifier: Apache-2.0
 * check.h: what a C test needs: a condition that must hold, said with its place if not.
 */
#ifndef OB_CHECK_H
#define OB_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#include "ob.h"

#define CHECK(condition) do { \
	if (!(condition)) { \
		fprintf(stderr, "%s:%d: %s: failed; last error: %s\n", __FILE__, __LINE__, #condition, ob_last_error()); \
		exit(1); \
	} } while (0)

#endif
