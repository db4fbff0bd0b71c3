/* Stand-in for libcuda.so.1: CUDA's virtual memory calls over memfd and mmap, for machines without a GPU.
 *
 * It holds callers to the driver's rules, returning the driver's own codes: sizes and addresses in whole granules of
 * 2 MiB, mappings inside one reservation and over nothing, access set before use, nothing unmapped or released twice,
 * and an address range freed only when nothing is mapped in it. The stub_* functions below are for the tests.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, ILLEGAL_ADDRESS = 700, MANY = 1 << 16 };
#define GRANULE ((size_t)2 << 20)

typedef int Result;
typedef unsigned long long Pointer;
typedef struct { Pointer start; size_t size; } Range;
typedef struct { int fd; size_t size; int mappings, released; } Allocation;
typedef struct { Range range; int allocation, accessible; } Mapping;

static Range reservations[64];
static Allocation allocations[MANY];
static Mapping mappings[MANY];
static size_t limit = SIZE_MAX, in_use, calls;

static int aligned(unsigned long long value) { return value % GRANULE == 0; }
static int inside(Pointer start, size_t size, Range range) {
    return range.size && start >= range.start && start + size <= range.start + range.size;
}
static int overlaps(Pointer start, size_t size, Range range) {
    return range.size && start < range.start + range.size && range.start < start + size;
}

/* --- for the tests --- */
void stub_set_limit(size_t bytes) { limit = bytes; }
size_t stub_in_use(void) { return in_use; }
size_t stub_calls(void) { return calls; }
int stub_mappings(void) { int n = 0; for (int i = 0; i < MANY; i++) n += mappings[i].range.size > 0; return n; }
int stub_reservations(void) { int n = 0; for (int i = 0; i < 64; i++) n += reservations[i].size > 0; return n; }

/* --- the driver --- */
Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuMemGetAllocationGranularity(size_t *granularity, const void *properties, int option) {
    *granularity = GRANULE;
    return SUCCESS;
}

Result cuMemAddressReserve(Pointer *out, size_t size, size_t alignment, Pointer hint, unsigned long long flags) {
    calls++;
    if (!size || !aligned(size) || !aligned(alignment)) return INVALID_VALUE;
    if (alignment < GRANULE) alignment = GRANULE;
    char *wide = mmap(0, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (wide == MAP_FAILED) return OUT_OF_MEMORY;
    Pointer start = ((Pointer)wide + alignment - 1) / alignment * alignment;
    if (start > (Pointer)wide) munmap(wide, start - (Pointer)wide);
    munmap((void *)(start + size), (Pointer)wide + alignment - start);
    for (int i = 0; i < 64; i++)
        if (!reservations[i].size) {
            reservations[i] = (Range){start, size};
            *out = start;
            return SUCCESS;
        }
    return OUT_OF_MEMORY;
}

Result cuMemAddressFree(Pointer start, size_t size) {
    calls++;
    for (int i = 0; i < MANY; i++)
        if (overlaps(start, size, mappings[i].range)) return INVALID_VALUE;
    for (int i = 0; i < 64; i++)
        if (reservations[i].start == start && reservations[i].size == size) {
            munmap((void *)start, size);
            reservations[i].size = 0;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

Result cuMemCreate(unsigned long long *handle, size_t size, const void *properties, unsigned long long flags) {
    calls++;
    if (!size || !aligned(size)) return INVALID_VALUE;
    if (size > limit - in_use) return OUT_OF_MEMORY;
    for (int i = 1; i < MANY; i++)
        if (!allocations[i].size) {
            int fd = memfd_create("granule", 0);
            if (fd < 0 || ftruncate(fd, size)) return OUT_OF_MEMORY;
            /* Not zeroed, as on a GPU: whoever reads before writing is to notice. */
            if (pwrite(fd, "\xAA", 1, 0) != 1) return OUT_OF_MEMORY;
            allocations[i] = (Allocation){fd, size, 0, 0};
            in_use += size;
            *handle = i;
            return SUCCESS;
        }
    return OUT_OF_MEMORY;
}

static void forget(Allocation *allocation) {
    if (allocation->released && !allocation->mappings) { /* memory goes when it is released and nowhere mapped */
        close(allocation->fd);
        in_use -= allocation->size;
        allocation->size = 0;
    }
}

Result cuMemRelease(unsigned long long handle) {
    calls++;
    if (handle >= MANY || !allocations[handle].size || allocations[handle].released) return INVALID_VALUE;
    allocations[handle].released = 1;
    forget(&allocations[handle]);
    return SUCCESS;
}

Result cuMemMap(Pointer start, size_t size, size_t offset, unsigned long long handle, unsigned long long flags) {
    calls++;
    int reserved = 0, slot = -1;
    if (handle >= MANY || !allocations[handle].size || offset || size != allocations[handle].size || !aligned(start))
        return INVALID_VALUE;
    for (int i = 0; i < 64; i++) reserved |= inside(start, size, reservations[i]);
    for (int i = MANY - 1; i >= 0; i--) {
        if (overlaps(start, size, mappings[i].range)) return INVALID_VALUE;
        if (!mappings[i].range.size) slot = i;
    }
    if (!reserved || slot < 0) return INVALID_VALUE;
    if (mmap((void *)start, size, PROT_NONE, MAP_SHARED | MAP_FIXED, allocations[handle].fd, 0) == MAP_FAILED)
        return OUT_OF_MEMORY;
    mappings[slot] = (Mapping){{start, size}, (int)handle, 0};
    allocations[handle].mappings++;
    return SUCCESS;
}

Result cuMemUnmap(Pointer start, size_t size) {
    calls++;
    for (int i = 0; i < MANY; i++)
        if (mappings[i].range.start == start && mappings[i].range.size == size) {
            mmap((void *)start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
            Allocation *allocation = &allocations[mappings[i].allocation];
            mappings[i].range.size = 0;
            allocation->mappings--;
            forget(allocation);
            return SUCCESS;
        }
    return INVALID_VALUE;
}

static Result each(Pointer start, size_t size, int grant) {
    size_t covered = 0;
    for (int i = 0; i < MANY; i++)
        if (inside(mappings[i].range.start, mappings[i].range.size, (Range){start, size}) && mappings[i].range.size) {
            if (!grant && !mappings[i].accessible) return ILLEGAL_ADDRESS;
            if (grant) mappings[i].accessible = 1;
            covered += mappings[i].range.size;
        }
    return covered == size ? SUCCESS : grant ? INVALID_VALUE : ILLEGAL_ADDRESS;
}

Result cuMemSetAccess(Pointer start, size_t size, const void *access, size_t count) {
    calls++;
    if (!aligned(start) || !aligned(size) || count != 1 || each(start, size, 1)) return INVALID_VALUE;
    return mprotect((void *)start, size, PROT_READ | PROT_WRITE) ? INVALID_VALUE : SUCCESS;
}

Result cuMemsetD8Async(Pointer start, unsigned char value, size_t size, void *stream) {
    calls++;
    if (each(start, size, 0)) return ILLEGAL_ADDRESS;
    memset((void *)start, value, size);
    return SUCCESS;
}

Result cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)(16 * device + i);
    return device < 0 || device > 15 ? INVALID_DEVICE : SUCCESS;
}

Result cuGetErrorString(Result error, const char **text) { *text = "an error of the stand-in"; return SUCCESS; }
Result cuGetErrorName(Result error, const char **text) { *text = "STUB"; return SUCCESS; }

Result cuGetProcAddress_v2(const char *name, void **out, int version, unsigned long long flags, int *status) {
    void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *out = self ? dlsym(self, name) : NULL;
    if (status) *status = *out ? 0 : 1;
    return SUCCESS;
}
Result cuGetProcAddress(const char *name, void **out, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, out, version, flags, NULL);
}
