/* Renaming, removing, linking, and what a name may be. */
#include "fsops.h"

#include <limits.h>
#include <linux/fs.h>

static void renames(void) {
    struct stat stat;
    close(file("a", "a"));
    close(file("b", "b"));
    mkdir("dir", 0755);
    mkdir("full", 0755);
    close(file("full/x", "x"));
    mkdir("empty", 0755);
    TRY("rename.noreplace-taken", renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_NOREPLACE));
    TRY("rename.noreplace-free", renameat2(AT_FDCWD, "a", AT_FDCWD, "c", RENAME_NOREPLACE));
    TRY("rename.exchange", renameat2(AT_FDCWD, "b", AT_FDCWD, "c", RENAME_EXCHANGE));
    HOLDS("rename.exchanged", contents("b")[0] == 'a' && contents("c")[0] == 'b');
    TRY("rename.exchange-with-directory", renameat2(AT_FDCWD, "b", AT_FDCWD, "full", RENAME_EXCHANGE));
    HOLDS("rename.exchanged-with-directory", contents("b/x")[0] == 'x' && contents("full")[0] == 'a');
    renameat2(AT_FDCWD, "b", AT_FDCWD, "full", RENAME_EXCHANGE);
    TRY("rename.exchange-missing", renameat2(AT_FDCWD, "b", AT_FDCWD, "none", RENAME_EXCHANGE));
    TRY("rename.flags-together", renameat2(AT_FDCWD, "b", AT_FDCWD, "c", RENAME_EXCHANGE | RENAME_NOREPLACE));
    TRY("rename.whiteout", renameat2(AT_FDCWD, "c", AT_FDCWD, "dir/c", RENAME_WHITEOUT));
    if (lstat("c", &stat) == 0) HOLDS("rename.whiteout-left", S_ISCHR(stat.st_mode) && stat.st_rdev == 0);
    TRY("rename.flag-unknown", renameat2(AT_FDCWD, "b", AT_FDCWD, "d", 1 << 10));
    TRY("rename.missing", rename("none", "d"));
    TRY("rename.onto-itself", rename("b", "b"));
    TRY("rename.file-onto-directory", rename("b", "dir"));
    TRY("rename.directory-onto-file", rename("dir", "b"));
    TRY("rename.directory-onto-full", rename("dir", "full"));
    TRY("rename.directory-onto-empty", rename("dir", "empty"));
    TRY("rename.into-itself", rename("full", "full/sub"));
    TRY("rename.onto-parent", rename("full/x", "full"));
    TRY("rename.dot", rename("full/.", "other"));
    close(file("one", "1"));
    link("one", "two");
    TRY("rename.hard-links", rename("one", "two"));
    TRY("rename.hard-links-keep-both", access("one", F_OK));
    int open_target = file("target", "old");
    close(file("source", "new"));
    TRY("rename.over-open-file", rename("source", "target"));
    char text[8] = "";
    NUMBER("rename.over-open-file-still-read", pread(open_target, text, 8, 0));
    HOLDS("rename.over-open-file-old-text", !strcmp(text, "old") && !strcmp(contents("target"), "new"));
    fstat(open_target, &stat);
    say_number("rename.over-open-file-links", stat.st_nlink);
    close(open_target);
    int directory = open("full", O_RDONLY | O_DIRECTORY);
    TRY("rename.open-directory", rename("full", "moved"));
    TRY("rename.open-directory-still-used", faccessat(directory, "x", R_OK, 0));
    close(directory);
}

static void removals(void) {
    struct stat stat;
    int fd = file("gone", "text");
    TRY("unlink.open", unlink("gone"));
    fstat(fd, &stat);
    say_number("unlink.open-links", stat.st_nlink);
    NUMBER("unlink.open-write", pwrite(fd, "more", 4, 4));
    TRY("unlink.open-truncate", ftruncate(fd, 6));
    TRY("unlink.open-chmod", fchmod(fd, 0600));
    TRY("unlink.open-sync", fsync(fd));
    fstat(fd, &stat);
    say_number("unlink.open-size", stat.st_size);
    int again = open("/proc/self/fd/3", O_RDONLY);
    if (again >= 0) close(again);
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    TRY("unlink.open-again", again = open(path, O_RDONLY));
    close(again);
    TRY("unlink.open-link-again", linkat(AT_FDCWD, path, AT_FDCWD, "back", AT_SYMLINK_FOLLOW));
    close(fd);
    close(file("gone", "new"));
    HOLDS("unlink.new-file-is-another", !strcmp(contents("gone"), "new"));
    mkdir("removed", 0755);
    int directory = open("removed", O_RDONLY | O_DIRECTORY);
    TRY("rmdir.open", rmdir("removed"));
    TRY("rmdir.open-stat", fstat(directory, &stat));
    TRY("rmdir.open-create", openat(directory, "x", O_CREAT | O_WRONLY, 0644));
    close(directory);
    mkdir("has", 0755);
    close(file("has/x", ""));
    TRY("rmdir.not-empty", rmdir("has"));
    TRY("rmdir.file", rmdir("has/x"));
    TRY("rmdir.dot", rmdir("has/."));
    TRY("rmdir.dot-dot", rmdir("has/.."));
    TRY("unlink.directory", unlink("has"));
    TRY("unlink.missing", unlink("none"));
    TRY("unlink.trailing-slash", unlink("has/x/"));
    TRY("unlink.through-a-file", unlink("has/x/y"));
}

static void links(void) {
    struct stat stat;
    char target[4097], got[4200];
    close(file("original", "x"));
    TRY("link.file", link("original", "second"));
    stat.st_nlink = 0;
    lstat("original", &stat);
    say_number("link.count", stat.st_nlink);
    ino_t inode = stat.st_ino;
    lstat("second", &stat);
    HOLDS("link.same-inode", stat.st_ino == inode);
    TRY("link.taken", link("original", "second"));
    TRY("link.directory", link("has", "has2"));
    TRY("link.missing", link("none", "x"));
    TRY("symlink.make", symlink("original", "sym"));
    TRY("link.symlink-itself", link("sym", "sym2"));
    HOLDS("symlink.followed", !strcmp(contents("sym2"), "x"));
    TRY("symlink.taken", symlink("x", "sym"));
    TRY("symlink.dangling", symlink("nowhere/at/all", "dangling"));
    TRY("symlink.dangling-open", open("dangling", O_RDONLY));
    TRY("symlink.dangling-create-exclusive", open("dangling", O_CREAT | O_EXCL | O_WRONLY, 0644));
    symlink("made-through", "through");
    TRY("symlink.create-through", open("through", O_CREAT | O_WRONLY, 0644));
    TRY("symlink.created-through", access("made-through", F_OK));
    symlink("loop-b", "loop-a");
    symlink("loop-a", "loop-b");
    TRY("symlink.loop", open("loop-a", O_RDONLY));
    TRY("symlink.nofollow", open("sym", O_RDONLY | O_NOFOLLOW));
    TRY("symlink.empty", symlink("", "sym-empty"));
    memset(target, 't', 4096);
    target[4096] = 0;
    TRY("symlink.4096", symlink(target, "sym4096"));
    target[4095] = 0;
    TRY("symlink.4095", symlink(target, "sym4095"));
    NUMBER("symlink.4095-read", readlink("sym4095", got, sizeof got));
    NUMBER("symlink.read-short-buffer", readlink("sym4095", got, 10));
    lstat("sym", &stat);
    say_number("symlink.size", stat.st_size);
    TRY("symlink.chown", lchown("sym", 7, 8));
    lstat("sym", &stat);
    HOLDS("symlink.chowned", stat.st_uid == 7 && stat.st_gid == 8);
    TRY("readlink.file", readlink("original", got, sizeof got));
}

static void spelling(void) {
    char name[300], deep[PATH_MAX + 100] = "";
    memset(name, 'n', 299);
    name[256] = 0;
    TRY("name.256", open(name, O_CREAT | O_WRONLY, 0644));
    TRY("name.256-mkdir", mkdir(name, 0755));
    TRY("name.256-stat", access(name, F_OK));
    TRY("name.256-rename", rename("original", name));
    TRY("name.256-symlink", symlink("x", name));
    name[255] = 0;
    TRY("name.255", open(name, O_CREAT | O_WRONLY, 0644));
    TRY("name.255-there", access(name, F_OK));
    TRY("name.255-removed", unlink(name));
    static const char *odd[] = {"new\nline", "\xff\xfe\x01", " ", "-rf", "a\\b", "\xc3\xa4", "a\xcc\x88", "...", "%s%n", "*"};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        char label[32];
        snprintf(label, sizeof label, "name.odd-%zu", i);
        close(file(odd[i], odd[i]));
        HOLDS(label, !strcmp(contents(odd[i]), odd[i]));
    }
    TRY("name.case-differs", access("ORIGINAL", F_OK));
    TRY("name.empty", open("", O_CREAT | O_WRONLY, 0644));
    /* 60 directories of 100 bytes are longer than a path may be, and each is reached from the one above. */
    name[100] = 0;
    int at = open(".", O_RDONLY | O_DIRECTORY), depth = 0;
    for (; depth < 60; depth++) {
        if (mkdirat(at, name, 0755)) break;
        int next = openat(at, name, O_RDONLY | O_DIRECTORY);
        if (next < 0) break;
        close(at);
        at = next;
    }
    say_number("path.deep", depth);
    TRY("path.deep-file", openat(at, "file", O_CREAT | O_WRONLY, 0644));
    close(at);
    while (strlen(deep) < PATH_MAX) { strcat(deep, name); strcat(deep, "/"); }
    TRY("path.too-long", access(deep, F_OK));
    TRY("path.through-a-file", access("original/x", F_OK));
    TRY("path.dot-dot", access("has/../original", F_OK));
    TRY("path.trailing-slash-on-file", open("original/", O_RDONLY));
    TRY("path.create-with-slash", open("newfile/", O_CREAT | O_WRONLY, 0644));
    TRY("path.mkdir-with-slash", mkdir("newdir/", 0755));
    TRY("path.directory-for-writing", open("has", O_WRONLY));
    TRY("path.o-directory-on-file", open("original", O_RDONLY | O_DIRECTORY));
    TRY("path.create-taken-exclusive", open("original", O_CREAT | O_EXCL | O_WRONLY, 0644));
    TRY("path.o-path", open("original", O_PATH));
}

void names(void) {
    renames();
    removals();
    links();
    spelling();
}
