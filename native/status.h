/* SPDX-License-Identifier: Apache-2.0
 * status.h: the sentence behind a negative return.
 */
#ifndef OB_STATUS_H
#define OB_STATUS_H

#include <errno.h>

/* Records "what failed: which thing: why" for this thread; returns -error, so that a
 * failing function ends in `return status_set(EBADMSG, ...)`. */
int status_set(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
