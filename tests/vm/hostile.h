/* See hostile.c. */
void be_hostile(void);
