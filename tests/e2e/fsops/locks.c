/* flock(2), fcntl(2)'s POSIX and open file description locks, between two processes. */
#include "fsops.h"

#include <sys/file.h>
#include <sys/wait.h>

static int posix(int fd, int command, int type, long start, long length) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return fcntl(fd, command, &lock);
}

static void opened(const char *name) {
    char path[4096];
    PEER("locks.peer-open", "open %d %s/%s", O_RDWR, getcwd(path, sizeof path), name);
}

static void flocks(void) {
    int fd = file("flock", "x");
    opened("flock");
    TRY("flock.exclusive", flock(fd, LOCK_EX | LOCK_NB));
    PEER("flock.peer-exclusive-conflicts", "flock %d", LOCK_EX | LOCK_NB);
    PEER("flock.peer-shared-conflicts", "flock %d", LOCK_SH | LOCK_NB);
    TRY("flock.downgrade", flock(fd, LOCK_SH | LOCK_NB));
    PEER("flock.peer-shared", "flock %d", LOCK_SH | LOCK_NB);
    TRY("flock.upgrade-conflicts", flock(fd, LOCK_EX | LOCK_NB));
    TRY("flock.unlock", flock(fd, LOCK_UN));
    PEER("flock.peer-upgrade", "flock %d", LOCK_EX | LOCK_NB);
    pid_t waiting = fork();
    if (waiting == 0) _exit(flock(fd, LOCK_EX) ? errno : 0);
    PEER("flock.peer-unlock", "flock %d", LOCK_UN);
    int status;
    waitpid(waiting, &status, 0);
    say_number("flock.waited-for", WEXITSTATUS(status));
    /* The child's lock is this open file's. */
    PEER("flock.held-by-the-open-file", "flock %d", LOCK_EX | LOCK_NB);
    close(fd);
    PEER("flock.gone-with-close", "flock %d", LOCK_EX | LOCK_NB);
    PEER("flock.close", "close");
}

static void posixes(void) {
    int fd = file("posix", "0123456789");
    opened("posix");
    TRY("posix.write-lock", posix(fd, F_SETLK, F_WRLCK, 0, 4));
    PEER("posix.peer-overlap-conflicts", "posix %d 3 2", F_WRLCK);
    PEER("posix.peer-read-conflicts", "posix %d 0 1", F_RDLCK);
    PEER("posix.peer-beside", "posix %d 4 2", F_WRLCK);
    PEER("posix.peer-to-the-end", "posix %d 100 0", F_WRLCK);
    struct flock held = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 4, .l_len = 0};
    TRY("posix.getlk", fcntl(fd, F_GETLK, &held));
    HOLDS("posix.getlk-tells-the-range", held.l_type == F_WRLCK && held.l_start == 4 && held.l_len == 2);
    TRY("posix.split", posix(fd, F_SETLK, F_UNLCK, 1, 1));
    PEER("posix.peer-in-the-gap", "posix %d 1 1", F_WRLCK);
    PEER("posix.peer-deeper-conflicts", "posix %d 1 2", F_WRLCK);
    TRY("posix.wrong-range", posix(fd, F_SETLK, F_WRLCK, -1, 1));
    int again = open("posix", O_RDONLY);
    TRY("posix.write-lock-needs-writing", posix(again, F_SETLK, F_WRLCK, 0, 1));
    close(again); /* takes all of this process's locks away */
    PEER("posix.gone-with-any-close", "posix %d 0 4", F_WRLCK);
    pid_t waiting = fork();
    if (waiting == 0) _exit(posix(fd, F_SETLKW, F_WRLCK, 0, 4) ? errno : 0);
    PEER("posix.peer-unlock", "posix %d 0 0", F_UNLCK);
    int status;
    waitpid(waiting, &status, 0);
    say_number("posix.waited-for", WEXITSTATUS(status));
    PEER("posix.gone-with-the-process", "posix %d 0 0", F_WRLCK);
    PEER("posix.close", "close");
    close(fd);
}

static void descriptions(void) {
    int fd = file("ofd", "0123456789"), other = open("ofd", O_RDWR);
    opened("ofd");
    TRY("ofd.lock", posix(fd, F_OFD_SETLK, F_WRLCK, 0, 4));
    TRY("ofd.own-other-open-file-conflicts", posix(other, F_OFD_SETLK, F_WRLCK, 0, 1));
    PEER("ofd.peer-conflicts", "ofd %d 0 1", F_WRLCK);
    PEER("ofd.peer-posix-conflicts", "posix %d 0 1", F_WRLCK);
    close(open("ofd", O_RDWR));
    PEER("ofd.kept-over-another-close", "ofd %d 0 1", F_WRLCK);
    close(fd);
    PEER("ofd.gone-with-its-close", "ofd %d 0 1", F_WRLCK);
    struct flock held = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    TRY("ofd.getlk", fcntl(other, F_OFD_GETLK, &held));
    HOLDS("ofd.getlk-names-no-process", held.l_type == F_WRLCK && held.l_pid == -1);
    PEER("ofd.close", "close");
    close(other);
}

static void leases(void) {
    int fd = file("lease", "x");
    TRY("lease.write", fcntl(fd, F_SETLEASE, F_WRLCK));
    NUMBER("lease.get", fcntl(fd, F_GETLEASE));
    close(fd);
}

void locks(void) {
    flocks();
    posixes();
    descriptions();
    leases();
}
