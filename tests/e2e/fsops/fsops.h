/* fsops: does what programs do to a file system and prints each outcome, a line an operation: `PLACE LABEL OUTCOME`. The outcome is `ok`, the
 * name of an errno, or a value. Two runs, one on a local file system and one in a pod, are compared line by line. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

/* Prints an outcome. */
void say(const char *label, const char *outcome);
void say_number(const char *label, long long number);

/* `ok` or errno's name, of a call that returns less than 0 when it fails. */
#define TRY(label, call) say(label, (long long)(call) >= 0 ? "ok" : strerrorname_np(errno))
/* The number that a call returns, or errno's name. */
#define NUMBER(label, call) do { long long n_ = (call); if (n_ < 0) say(label, strerrorname_np(errno)); else say_number(label, n_); } while (0)
/* Of something that must hold. */
#define HOLDS(label, condition) say(label, (condition) ? "yes" : "no")

/* A new file with a text in it; its descriptor, open for reading and writing. */
int file(const char *path, const char *text);
/* What a file holds (up to 4095 bytes), in a buffer that the next call takes again. */
const char *contents(const char *path);
/* Runs `what` in a child as this user and group, with no other groups and no capabilities but root's. */
void as(uid_t user, gid_t group, void (*what)(void));
/* The mode's permission bits in octal. */
void say_mode(const char *label, const char *path);

/* The other process, in a container of its own or a child of this one: sends a command and returns its answer (negative: errno). */
long long peer(const char *format, ...) __attribute__((format(printf, 1, 2)));
void peer_send(const char *format, ...) __attribute__((format(printf, 1, 2)));
long long peer_answer(void);
void peer_connect(const char *socket);
int peer_main(const char *socket);
/* The outcome of a command to the peer. */
#define PEER(label, ...) do { long long p_ = peer(__VA_ARGS__); say(label, p_ >= 0 ? "ok" : strerrorname_np(-p_)); } while (0)

extern const char *self; /* this program's path */

void locks(void);
void names(void);
void content(void);
void mapped(void);
void attributes(void);
void extended(void);
void special(void);
void directories(void);
void limits(void);
