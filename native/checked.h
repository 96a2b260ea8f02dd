/* SPDX-License-Identifier: Apache-2.0
 * checked.h: arithmetic on numbers that came from outside. checked_mul() returns
 * false and leaves *out alone when the true result does not fit.
 */
#ifndef OB_CHECKED_H
#define OB_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

static inline bool checked_mul(uint64_t a, uint64_t b, uint64_t *out)
{
	uint64_t product;
	if (__builtin_mul_overflow(a, b, &product))
		return false;
	*out = product;
	return true;
}

/* Does [offset, offset + length) lie inside [0, size)? Cannot overflow. */
static inline bool range_inside(uint64_t offset, uint64_t length, uint64_t size)
{
	return offset <= size && length <= size - offset;
}

#endif
