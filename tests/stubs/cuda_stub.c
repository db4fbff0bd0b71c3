/* A stub of libcuda.so.1 for machines without a GPU: CUDA's virtual memory calls over memfd and mmap.
 *
 * It enforces the driver's rules, with the driver's own status codes:
 *   - sizes and addresses are in whole granules of 2 MiB
 *   - a mapping lies inside one reservation and overlaps no other mapping
 *   - access is set before use
 *   - nothing is unmapped or released twice
 *   - an address range is freed only if nothing is mapped in it
 *   - nothing is unmapped that queued work will still touch
 *   - copies go between accessible device memory and pinned host memory
 *   - calls that need a context find one in the calling thread
 *
 * Streams run their work at once. After stub_hold(1), they run it only when the caller waits for an event behind it.
 * Tests call the stub_* functions.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
       INVALID_HANDLE = 400, ILLEGAL_ADDRESS = 700, MANY = 1 << 16, FEW = 64 };
#define GRANULE ((size_t)2 << 20)

typedef int Result;
typedef unsigned long long Pointer;
typedef struct { Pointer start; size_t size; } Range;
typedef struct { int fd; size_t size; int mappings, released; } Allocation;
typedef struct { Range range; int allocation, accessible; } Mapping;

/* value COPY: copies from `from`; TOUCH: a kernel that only touches the range. `range` is what must stay mapped. */
enum { TOUCH = -1, COPY = -2 };
typedef struct { Range range; void *stream; int value, done; void *to; const void *from; } Work;
typedef struct { int exists; void *stream; int behind; } Event;      /* behind: the items of work queued before it */

static Range reservations[FEW];
static Allocation allocations[MANY];
static Mapping mappings[MANY];
static Work work[MANY];
static Event events[FEW];
static Range pinned[MANY];
static size_t limit = SIZE_MAX, in_use, calls, pinned_limit = SIZE_MAX, pinned_in_use, copied;
static int queued, held;
static __thread void *context;

static int aligned(unsigned long long value) { return value % GRANULE == 0; }
static int inside(Pointer start, size_t size, Range range) {
    return range.size && start >= range.start && start + size <= range.start + range.size;
}
static int overlaps(Pointer start, size_t size, Range range) {
    return range.size && start < range.start + range.size && range.start < start + size;
}

static void run(void *stream, int behind) {
    for (int i = 0; i < behind; i++)
        if (!work[i].done && work[i].stream == stream) {
            if (work[i].value >= 0) memset((void *)work[i].range.start, work[i].value, work[i].range.size);
            if (work[i].value == COPY) memcpy(work[i].to, work[i].from, work[i].range.size);
            work[i].done = 1;
        }
}
static void queue(Pointer start, size_t size, void *stream, int value) {
    if (queued == MANY) abort();
    work[queued++] = (Work){{start, size}, stream, value, 0, 0, 0};
    if (!held) run(stream, queued);
}
static void queue_copy(Pointer device, void *to, const void *from, size_t size, void *stream) {
    if (queued == MANY) abort();
    work[queued++] = (Work){{device, size}, stream, COPY, 0, to, from};
    if (!held) run(stream, queued);
}

/* --- called by tests --- */
void stub_hold(int hold) { held = hold; }
void stub_launch(Pointer start, size_t size, void *stream) { queue(start, size, stream, TOUCH); }
int stub_queued(void) { int n = 0; for (int i = 0; i < queued; i++) n += !work[i].done; return n; }
int stub_events(void) { int n = 0; for (int i = 0; i < FEW; i++) n += events[i].exists; return n; }
void stub_set_limit(size_t bytes) { limit = bytes; }
size_t stub_in_use(void) { return in_use; }
void stub_set_pinned_limit(size_t bytes) { pinned_limit = bytes; }
size_t stub_pinned(void) { return pinned_in_use; }
size_t stub_copied(void) { return copied; }
size_t stub_calls(void) { return calls; }
int stub_mappings(void) { int n = 0; for (int i = 0; i < MANY; i++) n += mappings[i].range.size > 0; return n; }
int stub_reservations(void) { int n = 0; for (int i = 0; i < FEW; i++) n += reservations[i].size > 0; return n; }

/* --- the driver --- */
Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuMemGetAllocationGranularity(size_t *granularity, const void *properties, int option) {
    *granularity = GRANULE;
    return SUCCESS;
}

Result cuMemAddressReserve(Pointer *out, size_t size, size_t alignment, Pointer hint, unsigned long long flags) {
    calls++;
    if (!size || !aligned(size) || (alignment & (alignment - 1))) return INVALID_VALUE; /* a power of two, or zero */
    if (alignment < GRANULE) alignment = GRANULE;
    char *wide = mmap(0, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (wide == MAP_FAILED) return OUT_OF_MEMORY;
    Pointer start = ((Pointer)wide + alignment - 1) / alignment * alignment;
    if (start > (Pointer)wide) munmap(wide, start - (Pointer)wide);
    munmap((void *)(start + size), (Pointer)wide + alignment - start);
    for (int i = 0; i < FEW; i++)
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
    for (int i = 0; i < FEW; i++)
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
            /* Like a GPU's, this memory is not zeroed, so that a missing memset is noticed. */
            if (pwrite(fd, "\xAA", 1, 0) != 1) return OUT_OF_MEMORY;
            allocations[i] = (Allocation){fd, size, 0, 0};
            in_use += size;
            *handle = i;
            return SUCCESS;
        }
    return OUT_OF_MEMORY;
}

static void forget(Allocation *allocation) {
    if (allocation->released && !allocation->mappings) { /* CUDA frees memory once it is released and mapped nowhere */
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
    for (int i = 0; i < FEW; i++) reserved |= inside(start, size, reservations[i]);
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
    for (int i = 0; i < queued; i++)
        if (!work[i].done && overlaps(start, size, work[i].range)) return ILLEGAL_ADDRESS; /* a GPU reports it later */
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
    if (!context) return INVALID_CONTEXT;
    if (each(start, size, 0)) return ILLEGAL_ADDRESS;
    queue(start, size, stream, value);
    return SUCCESS;
}

Result cuMemHostAlloc(void **out, size_t size, unsigned flags) {
    if (!context) return INVALID_CONTEXT;
    if (size > pinned_limit - pinned_in_use) return OUT_OF_MEMORY;
    for (int i = 0; i < MANY; i++)
        if (!pinned[i].size) {
            *out = malloc(size);
            memset(*out, 0xBB, size);
            pinned[i] = (Range){(Pointer)*out, size};
            pinned_in_use += size;
            return SUCCESS;
        }
    return OUT_OF_MEMORY;
}
Result cuMemFreeHost(void *start) {
    for (int i = 0; i < MANY; i++)
        if (pinned[i].size && pinned[i].start == (Pointer)start) {
            pinned_in_use -= pinned[i].size;
            pinned[i].size = 0;
            free(start);
            return SUCCESS;
        }
    return INVALID_VALUE;
}
static int is_pinned(const void *start, size_t size) {
    for (int i = 0; i < MANY; i++) if (inside((Pointer)start, size, pinned[i])) return 1;
    return 0;
}
Result cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t size, void *stream) {
    if (!context) return INVALID_CONTEXT;
    if (!is_pinned(to, size) || each(from, size, 0)) return INVALID_VALUE;
    copied += size;
    queue_copy(from, to, (const void *)from, size, stream);
    return SUCCESS;
}
Result cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t size, void *stream) {
    if (!context) return INVALID_CONTEXT;
    if (!is_pinned(from, size) || each(to, size, 0)) return INVALID_VALUE;
    queue_copy(to, (void *)to, from, size, stream);
    return SUCCESS;
}
Result cuMemcpyDtoHAsync(void *to, Pointer from, size_t size, void *stream) { return cuMemcpyDtoHAsync_v2(to, from, size, stream); }
Result cuMemcpyHtoDAsync(Pointer to, const void *from, size_t size, void *stream) { return cuMemcpyHtoDAsync_v2(to, from, size, stream); }
Result cuStreamSynchronize(void *stream) {
    if (!context) return INVALID_CONTEXT;
    run(stream, queued);
    return SUCCESS;
}

Result cuCtxGetCurrent(void **out) { *out = context; return SUCCESS; }
Result cuCtxSetCurrent(void *wanted) { context = wanted; return SUCCESS; }

/* The handle of an event is its index plus 1. */
static Event *event(size_t handle) { return handle && handle <= FEW && events[handle - 1].exists ? &events[handle - 1] : 0; }

Result cuEventCreate(size_t *handle, unsigned flags) {
    if (!context) return INVALID_CONTEXT;
    for (int i = 0; i < FEW; i++)
        if (!events[i].exists) {
            events[i] = (Event){1, 0, 0};
            *handle = i + 1;
            return SUCCESS;
        }
    return OUT_OF_MEMORY;
}
Result cuEventRecord(size_t handle, void *stream) {
    if (!context) return INVALID_CONTEXT;
    if (!event(handle)) return INVALID_HANDLE;
    *event(handle) = (Event){1, stream, queued};
    return SUCCESS;
}
Result cuEventSynchronize(size_t handle) {
    if (!context) return INVALID_CONTEXT;
    if (!event(handle)) return INVALID_HANDLE;
    run(event(handle)->stream, event(handle)->behind);
    return SUCCESS;
}
Result cuEventDestroy(size_t handle) {
    if (!event(handle)) return INVALID_HANDLE;
    event(handle)->exists = 0;
    return SUCCESS;
}

Result cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)(16 * device + i);
    return device < 0 || device > 15 ? INVALID_DEVICE : SUCCESS;
}
Result cuDeviceGetUuid(unsigned char *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

Result cuGetErrorString(Result error, const char **text) { *text = "an error of the stub"; return SUCCESS; }
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
