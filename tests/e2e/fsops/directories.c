/* Listing: while entries come and go, from a remembered place, many entries (FSOPS_MANY of them, else 200). */
#include "fsops.h"

#include <dirent.h>

#define MANY 200

static int count(const char *path) {
    DIR *directory = opendir(path);
    int entries = 0;
    while (readdir(directory)) entries++;
    closedir(directory);
    return entries;
}

static void make(const char *path, int number) {
    char name[64];
    mkdir(path, 0755);
    for (int i = 0; i < number; i++) {
        snprintf(name, sizeof name, "%s/entry-%06d", path, i);
        int fd = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
        if (fd < 0) { say("directory.make", strerrorname_np(errno)); return; }
        close(fd);
    }
}

static void many(void) {
    const char *wanted = getenv("FSOPS_MANY");
    int number = wanted ? atoi(wanted) : MANY;
    make("many", number);
    HOLDS("directory.many-listed", count("many") == number + 2);
    DIR *directory = opendir("many");
    struct dirent *entry;
    int seen = 0;
    while ((entry = readdir(directory)))
        if (entry->d_name[0] != '.') { seen++; unlinkat(dirfd(directory), entry->d_name, 0); }
    closedir(directory);
    HOLDS("directory.all-seen-while-deleting", seen == number);
    say_number("directory.left-after-deleting", count("many"));
    TRY("directory.removed", rmdir("many"));
}

static void places(void) {
    char third[256] = "";
    make("places", 100);
    DIR *directory = opendir("places");
    struct dirent *entry;
    for (int i = 0; i < 60; i++) readdir(directory);
    long place = telldir(directory);
    entry = readdir(directory);
    strcpy(third, entry->d_name);
    while (readdir(directory)) {}
    seekdir(directory, place);
    entry = readdir(directory);
    HOLDS("directory.seekdir", entry && !strcmp(entry->d_name, third));
    rewinddir(directory);
    close(file("places/late", ""));
    rewinddir(directory);
    int late = 0, dots = 0, typed = 0;
    while ((entry = readdir(directory))) {
        late += !strcmp(entry->d_name, "late");
        dots += entry->d_name[0] == '.';
        typed += entry->d_type == DT_REG;
    }
    say_number("directory.rewound-sees-new", late);
    say_number("directory.dots", dots);
    say_number("directory.types", typed);
    int other = openat(dirfd(directory), "..", O_RDONLY | O_DIRECTORY);
    TRY("directory.dot-dot", other);
    close(other);
    closedir(directory);
    mkdir("removed", 0755);
    directory = opendir("removed");
    rmdir("removed");
    say_number("directory.removed-is-empty", readdir(directory) ? 1 : 0);
    closedir(directory);
}

static void inodes(void) {
    DIR *directory = opendir("places");
    struct dirent *entry;
    struct stat stat;
    int same = 1;
    while ((entry = readdir(directory)))
        if (entry->d_name[0] != '.') same &= fstatat(dirfd(directory), entry->d_name, &stat, 0) == 0 && stat.st_ino == entry->d_ino;
    closedir(directory);
    HOLDS("directory.inodes-are-stats", same);
}

void directories(void) {
    many();
    places();
    inodes();
}
