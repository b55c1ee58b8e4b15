/* Owners, modes, set-id bits, times, figures. */
#include "fsops.h"

#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

static void say_owner(const char *label, const char *path) {
    struct stat stat;
    char text[32];
    if (lstat(path, &stat)) { say(label, strerrorname_np(errno)); return; }
    snprintf(text, sizeof text, "%u:%u", stat.st_uid, stat.st_gid);
    say(label, text);
}

static void makes_as_user(void) {
    umask(027);
    close(open("common/file", O_CREAT | O_WRONLY, 0666));
    mkdir("common/dir", 0777);
    mkfifo("common/fifo", 0666);
    symlink("x", "common/sym");
    close(open("setgid/file", O_CREAT | O_WRONLY, 0666));
    close(open("setgid/set-id-file", O_CREAT | O_WRONLY, 06777));
    mkdir("setgid/dir", 0777);
    TRY("user.create-in-roots", open("roots/file", O_CREAT | O_WRONLY, 0644));
    TRY("user.unlink-in-sticky", unlink("common/roots-file"));
    TRY("user.rename-in-sticky", rename("common/roots-file", "common/mine"));
    TRY("user.unlink-own-in-sticky", unlink("common/fifo"));
    TRY("user.chown", chown("common/file", 1001, -1));
    TRY("user.chgrp-to-another", chown("common/file", -1, 77));
    TRY("user.chmod-roots", chmod("roots", 0777));
    TRY("user.open-unreadable", open("secret", O_RDONLY));
    TRY("user.enter-unsearchable", access("roots-only/file", F_OK));
    TRY("user.utimes-now-roots-writable", utimensat(AT_FDCWD, "common/roots-writable", NULL, 0));
    struct timespec times[2] = {{1, 0}, {1, 0}};
    TRY("user.utimes-set-roots", utimensat(AT_FDCWD, "common/roots-writable", times, 0));
    TRY("user.noatime-of-roots", open("common/roots-writable", O_RDONLY | O_NOATIME));
    TRY("user.link-roots-unreadable", link("secret", "common/stolen"));
    TRY("user.set-group-id-of-another-group", chmod("own", 02755));
}

static void writes_set_id(void) {
    int fd = open("set-id", O_WRONLY);
    TRY("set-id.write-as-user", write(fd, "x", 1));
    close(fd);
    TRY("set-id.truncate-as-user", truncate("set-id-truncated", 0));
    TRY("set-id.open-truncating-as-user", fd = open("set-id-opened", O_WRONLY | O_TRUNC));
    close(fd);
    fd = open("set-id-allocated", O_WRONLY);
    TRY("set-id.fallocate-as-user", fallocate(fd, 0, 0, 100));
    close(fd);
}

static void owners(void) {
    mkdir("common", 0777);
    chmod("common", 01777);
    mkdir("roots", 0755);
    mkdir("roots-only", 0700);
    close(file("roots-only/file", ""));
    mkdir("setgid", 0777);
    chmod("setgid", 02777);
    TRY("chown.group-of-directory", chown("setgid", -1, 55));
    chmod("setgid", 02777);
    close(file("secret", "secret"));
    chmod("secret", 0600);
    close(file("common/roots-file", ""));
    close(file("common/roots-writable", ""));
    chmod("common/roots-writable", 0666);
    close(file("own", ""));
    chown("own", 1000, 77);
    as(1000, 1000, makes_as_user);
    say_mode("user.file-mode", "common/file");
    say_owner("user.file-owner", "common/file");
    say_mode("user.dir-mode", "common/dir");
    say_owner("user.dir-owner", "common/dir");
    say_owner("user.symlink-owner", "common/sym");
    say_owner("user.setgid-file-owner", "setgid/file");
    say_mode("user.setgid-set-id-file-mode", "setgid/set-id-file");
    say_owner("user.setgid-dir-owner", "setgid/dir");
    say_mode("user.setgid-dir-mode", "setgid/dir");
    say_mode("user.set-group-id-refused", "own");
    static const char *set[] = {"set-id", "set-id-truncated", "set-id-opened", "set-id-allocated"};
    for (int i = 0; i < 4; i++) {
        close(file(set[i], "text"));
        chmod(set[i], 06777);
    }
    int fd = open("set-id", O_WRONLY);
    write(fd, "y", 1);
    close(fd);
    say_mode("set-id.kept-on-roots-write", "set-id");
    as(1000, 1000, writes_set_id);
    say_mode("set-id.cleared-by-write", "set-id");
    say_mode("set-id.cleared-by-truncate", "set-id-truncated");
    say_mode("set-id.cleared-by-open", "set-id-opened");
    say_mode("set-id.cleared-by-fallocate", "set-id-allocated");
    chmod("set-id", 06777);
    TRY("set-id.chown", chown("set-id", 1000, 1000));
    say_mode("set-id.cleared-by-chown", "set-id");
    chmod("set-id", 02767);
    TRY("set-id.chown-no-group-execution", chown("set-id", 0, 0));
    say_mode("set-id.kept-without-group-execution", "set-id");
    TRY("chmod.sticky-file", chmod("secret", 01644));
    say_mode("chmod.sticky-file-mode", "secret");
    TRY("chown.large-ids", chown("secret", 4000000000u, 4000000001u));
    say_owner("chown.large-ids-owner", "secret");
    umask(077);
    close(open("masked", O_CREAT | O_WRONLY, 0666));
    mkdir("masked-dir", 01777);
    mknod("masked-fifo", S_IFIFO | 0666, 0);
    umask(022);
    say_mode("umask.file", "masked");
    say_mode("umask.dir", "masked-dir");
    say_mode("umask.fifo", "masked-fifo");
}

static void times(void) {
    struct stat stat, after;
    struct timespec set[2] = {{1000000001, 123456789}, {1000000002, 987654321}};
    close(file("times", "x"));
    TRY("utimens.set", utimensat(AT_FDCWD, "times", set, 0));
    lstat("times", &stat);
    HOLDS("utimens.nanoseconds", stat.st_atim.tv_sec == 1000000001 && stat.st_atim.tv_nsec == 123456789
        && stat.st_mtim.tv_sec == 1000000002 && stat.st_mtim.tv_nsec == 987654321);
    set[0].tv_nsec = UTIME_OMIT;
    set[1].tv_sec = 5;
    set[1].tv_nsec = 6;
    TRY("utimens.omit", utimensat(AT_FDCWD, "times", set, 0));
    lstat("times", &stat);
    HOLDS("utimens.omitted", stat.st_atim.tv_sec == 1000000001 && stat.st_mtim.tv_sec == 5 && stat.st_mtim.tv_nsec == 6);
    set[0].tv_nsec = UTIME_NOW;
    set[1].tv_nsec = UTIME_OMIT;
    TRY("utimens.now", utimensat(AT_FDCWD, "times", set, 0));
    lstat("times", &stat);
    HOLDS("utimens.now-is-recent", stat.st_atim.tv_sec > 1600000000 && stat.st_mtim.tv_sec == 5);
    set[0] = set[1] = (struct timespec){-100, 5};
    TRY("utimens.before-1970", utimensat(AT_FDCWD, "times", set, 0));
    lstat("times", &stat);
    say_number("utimens.before-1970-seconds", stat.st_mtim.tv_sec);
    set[0] = set[1] = (struct timespec){1, 1000000000};
    TRY("utimens.wrong-nanoseconds", utimensat(AT_FDCWD, "times", set, 0));
    symlink("times", "times-link");
    set[0] = set[1] = (struct timespec){7, 8};
    TRY("utimens.symlink", utimensat(AT_FDCWD, "times-link", set, AT_SYMLINK_NOFOLLOW));
    lstat("times-link", &stat);
    HOLDS("utimens.symlink-set", stat.st_mtim.tv_sec == 7 && stat.st_mtim.tv_nsec == 8);
    mkdir("times-dir", 0755);
    utimensat(AT_FDCWD, "times-dir", set, 0);
    close(file("times-dir/new", ""));
    lstat("times-dir", &stat);
    HOLDS("times.directory-changed-by-create", stat.st_mtim.tv_sec > 1600000000);
    utimensat(AT_FDCWD, "times-dir", set, 0);
    unlink("times-dir/new");
    lstat("times-dir", &stat);
    HOLDS("times.directory-changed-by-unlink", stat.st_mtim.tv_sec > 1600000000);
    utimensat(AT_FDCWD, "times", set, 0);
    int fd = open("times", O_WRONLY);
    write(fd, "y", 1);
    fstat(fd, &stat);
    HOLDS("times.changed-by-write", stat.st_mtim.tv_sec > 1600000000);
    lstat("times", &after);
    HOLDS("times.same-by-path", after.st_mtim.tv_sec == stat.st_mtim.tv_sec && after.st_mtim.tv_nsec == stat.st_mtim.tv_nsec);
    set[0].tv_nsec = UTIME_OMIT;
    TRY("futimens.open-file", futimens(fd, set));
    close(fd);
    lstat("times", &after);
    HOLDS("times.kept-over-close", after.st_mtim.tv_sec == 7);
    stat = after;
    usleep(20000);
    chmod("times", 0600);
    lstat("times", &after);
    HOLDS("times.change-time-by-chmod", after.st_ctim.tv_sec != stat.st_ctim.tv_sec || after.st_ctim.tv_nsec != stat.st_ctim.tv_nsec);
    struct statx extended;
    TRY("statx.birth", statx(AT_FDCWD, "times", 0, STATX_BTIME, &extended));
    HOLDS("statx.birth-known", extended.stx_mask & STATX_BTIME && extended.stx_btime.tv_sec > 1600000000);
}

static void figures(void) {
    struct statfs figures;
    struct stat stat, other;
    char text[32];
    TRY("statfs", statfs(".", &figures));
    snprintf(text, sizeof text, "%lx", (long)figures.f_type);
    say("statfs.type", text);
    say_number("statfs.block-size", figures.f_bsize);
    say_number("statfs.name-length", figures.f_namelen);
    say_number("statfs.blocks", figures.f_blocks);
    HOLDS("statfs.free-blocks", figures.f_bfree > 0 && figures.f_bavail <= figures.f_bfree);
    lstat(".", &stat);
    lstat("secret", &other);
    HOLDS("stat.same-device", stat.st_dev == other.st_dev);
    say_number("stat.block-size", stat.st_blksize);
    close(file("hundred", ""));
    truncate("hundred", 100);
    lstat("hundred", &stat);
    say_number("stat.size", stat.st_size);
    HOLDS("stat.inode", stat.st_ino != 0);
    mkdir("parent", 0755);
    mkdir("parent/a", 0755);
    mkdir("parent/b", 0755);
    lstat("parent", &stat);
    say_number("stat.directory-links", stat.st_nlink);
    say_number("pathconf.name", pathconf(".", _PC_NAME_MAX));
}

void attributes(void) {
    owners();
    times();
    figures();
}
