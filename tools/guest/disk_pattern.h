// The content of the lab's slow disk (tools/lab/slow_fs.c), as whoever reads it checks it.
#pragma once

#include <stdint.h>

// The disk's `index`-th word of 64 bits. Never 0, and unlike its neighbours.
static inline uint64_t DiskWord(uint64_t index) {
  uint64_t word = (index + 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
  word = (word ^ (word >> 29)) * 0x94d049bb133111ebull;
  return (word ^ (word >> 32)) | 1;
}
