/* Full and limited file systems, where FSOPS_SMALL names one of a few MiB, FSOPS_QUOTA one on which uid 3000 may have 1 MiB, FSOPS_READONLY one
 * that is read-only. */
#include "fsops.h"

#include <sys/mman.h>
#include <sys/xattr.h>

static char chunk[1 << 16];

/* Writes until that fails; whether at least `least` bytes went. */
static void fill(const char *label, int fd, long long least) {
    char name[64];
    long long written = 0;
    ssize_t length;
    while ((length = write(fd, chunk, sizeof chunk)) > 0 && written < 64 << 20) written += length;
    say(label, length < 0 ? strerrorname_np(errno) : "no error");
    snprintf(name, sizeof name, "%s-after-enough", label);
    HOLDS(name, written >= least);
}

static void small(const char *path) {
    if (chdir(path)) { say("full.chdir", strerrorname_np(errno)); return; }
    int fd = file("reserved", "");
    fill("full.write", fd, 1 << 20);
    TRY("full.fallocate", fallocate(fd, 0, 0, 64 << 20));
    int other = open("other", O_CREAT | O_RDWR, 0644);
    TRY("full.write-another", write(other, chunk, sizeof chunk));
    TRY("full.fsync", fsync(fd));
    TRY("full.truncate-up", ftruncate(other, 1 << 20));
    TRY("full.read-on", pread(fd, chunk, 10, 0));
    unlink("reserved");
    close(fd);
    /* The guest's kernel does not wait for the end of a close. */
    ssize_t length = -1;
    for (int tries = 0; length < 0 && tries < 100; tries++, usleep(20000)) length = write(other, chunk, sizeof chunk);
    NUMBER("full.write-after-removal", length);
    close(other);
    unlink("other");
}

static const char *quota_path;

static void beyond_quota(void) {
    if (chdir(quota_path)) { say("quota.chdir", strerrorname_np(errno)); return; }
    int fd = open("much", O_CREAT | O_RDWR, 0644);
    TRY("quota.create", fd);
    fill("quota.write", fd, 512 << 10);
    TRY("quota.fallocate", fallocate(fd, 0, 0, 8 << 20));
    close(fd);
    TRY("quota.unlink", unlink("much"));
}

static void readonly(const char *path) {
    struct stat stat;
    if (chdir(path)) { say("readonly.chdir", strerrorname_np(errno)); return; }
    TRY("readonly.stat", lstat("there", &stat));
    TRY("readonly.open", open("there", O_RDONLY));
    TRY("readonly.open-for-writing", open("there", O_RDWR));
    TRY("readonly.create", open("new", O_CREAT | O_WRONLY, 0644));
    TRY("readonly.create-taken", open("there", O_CREAT | O_RDONLY, 0644));
    TRY("readonly.truncate", truncate("there", 0));
    TRY("readonly.unlink", unlink("there"));
    TRY("readonly.rename", rename("there", "here"));
    TRY("readonly.link", link("there", "here"));
    TRY("readonly.symlink", symlink("there", "here"));
    TRY("readonly.mkdir", mkdir("new", 0755));
    TRY("readonly.mkdir-taken", mkdir("there", 0755));
    TRY("readonly.rmdir-missing", rmdir("none"));
    TRY("readonly.mkfifo", mkfifo("new", 0644));
    TRY("readonly.chmod", chmod("there", 0600));
    TRY("readonly.chown", chown("there", 1, 1));
    TRY("readonly.utimes", utimensat(AT_FDCWD, "there", NULL, 0));
    TRY("readonly.setxattr", setxattr("there", "user.a", "v", 1, 0));
    TRY("readonly.tmpfile", open(".", O_TMPFILE | O_RDWR, 0600));
    TRY("readonly.access", access("there", W_OK));
    int fd = open("there", O_RDONLY);
    TRY("readonly.fchmod", fchmod(fd, 0600));
    TRY("readonly.fsync", fsync(fd));
    close(fd);
}

void limits(void) {
    if (getenv("FSOPS_SMALL")) small(getenv("FSOPS_SMALL"));
    quota_path = getenv("FSOPS_QUOTA");
    if (quota_path) as(3000, 3000, beyond_quota);
    if (getenv("FSOPS_READONLY")) readonly(getenv("FSOPS_READONLY"));
}
