/* SPDX-License-Identifier: Apache-2.0
 * list.h: doubly linked lists through two fields of the item; new items come first.
 */
#ifndef OB_LIST_H
#define OB_LIST_H

#define LIST_ADD(head, item, next_field, prev_field) do { \
	(item)->prev_field = NULL; (item)->next_field = (head); \
	if (head) (head)->prev_field = (item); \
	(head) = (item); } while (0)
#define LIST_DEL(head, item, next_field, prev_field) do { \
	if ((item)->prev_field) (item)->prev_field->next_field = (item)->next_field; else (head) = (item)->next_field; \
	if ((item)->next_field) (item)->next_field->prev_field = (item)->prev_field; } while (0)

#endif
