/* SPDX-License-Identifier: Apache-2.0
 * status.c: the last failure of each thread, as text.
 */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>

#include "ob.h"

static _Thread_local char last_error[512];

int status_set(int error, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(last_error, sizeof(last_error), format, arguments);
	va_end(arguments);
	return -error;
}

const char *ob_last_error(void)
{
	return last_error;
}

uint32_t ob_abi_version(void)
{
	return OB_ABI_VERSION;
}
