/* SPDX-License-Identifier: Apache-2.0
 * round.h: to multiples. `unit` is a power of two except in div_up(). The caller has
 * made sure that rounding up does not pass 2^64.
 */
#ifndef OB_ROUND_H
#define OB_ROUND_H

#include <stdbool.h>
#include <stdint.h>

static inline bool is_power_of_two(uint64_t value)
{
	return value != 0 && (value & (value - 1)) == 0;
}

static inline uint64_t round_up(uint64_t value, uint64_t unit)
{
	return (value + unit - 1) & ~(unit - 1);
}

/* ceil(value / unit) for any unit > 0; no overflow. */
static inline uint64_t div_up(uint64_t value, uint64_t unit)
{
	return value / unit + (value % unit != 0);
}

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

#endif
