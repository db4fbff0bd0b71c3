/* A scripted stub of libnvidia-ml.so.1 for machines without a GPU. Every call reads the file $NVML_STUB again: lines
 * `key=value`. A value without a line is not supported, as on a real device.
 *
 *   init.error=9            the status of nvmlInit (9: driver not loaded)
 *   driver=580.65.06
 *   count=1
 *   0.name=NVIDIA H200
 *   0.total=..  0.used=..   bytes
 *   0.gpu=73                utilization, percent
 *   0.power=412000          milliwatts
 *   0.temperature=61        Celsius
 *   0.processes=101:2000,7  process id and bytes; without bytes, the driver does not report them
 *   0.samples=5:101:40,9:101:200   time in microseconds, process id and percent of each sample of a process's use
 *   0.uuid=GPU-8a..         in the driver's format
 *   0.mig=3                 the GPU is in MIG mode, with 3 places for instances, some of which may be empty
 *   0.mig.2.uuid=MIG-5c..   the instance at place 2, which exists if it has a uuid; it takes the keys above
 *   0.error=15              the status of every query of the device (15: lost)
 */
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { DEVICES_MAX = 16, INSTANCES_MAX = 8 };

typedef struct { unsigned index; char prefix[24]; } Device;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } Process;
typedef struct { unsigned pid; unsigned long long time; unsigned sm, memory, encoder, decoder; } Sample;

static Device devices[DEVICES_MAX], instances[DEVICES_MAX][INSTANCES_MAX];
static int initialized;

static int lookup(const char *key, char *value, size_t size) {
    const char *path = getenv("NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    size_t length = strlen(key);
    int found = 0;
    if (!file) return 0;
    while (!found && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\r\n")] = 0;
        if (strncmp(line, key, length) == 0 && line[length] == '=') {
            snprintf(value, size, "%s", line + length + 1);
            found = 1;
        }
    }
    fclose(file);
    return found;
}

static int number(const char *key, int otherwise) {
    char value[64];
    return lookup(key, value, sizeof value) ? atoi(value) : otherwise;
}

static int of_device(Device *device, const char *field, char *value, size_t size) {
    char key[64];
    int error;
    if (!initialized) return UNINITIALIZED;
    snprintf(key, sizeof key, "%u.error", device->index);
    if ((error = number(key, SUCCESS)) != SUCCESS) return error;
    snprintf(key, sizeof key, "%s.%s", device->prefix, field);
    return lookup(key, value, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlInitWithFlags(unsigned flags) {
    int error = number("init.error", SUCCESS);
    (void)flags;
    if (error == SUCCESS) initialized++;
    return error;
}

int nvmlShutdown(void) {
    if (!initialized) return UNINITIALIZED;
    initialized--;
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    if (!initialized) return UNINITIALIZED;
    return lookup("driver", version, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (!initialized) return UNINITIALIZED;
    *count = (unsigned)number("count", 0);
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    unsigned count;
    int error = nvmlDeviceGetCount_v2(&count);
    if (error != SUCCESS) return error;
    if (index >= count || index >= DEVICES_MAX) return INVALID_ARGUMENT;
    devices[index].index = index;
    snprintf(devices[index].prefix, sizeof devices[index].prefix, "%u", index);
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned size) { return of_device(device, "uuid", uuid, size); }

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) {
    char text[64];
    int error = of_device(device, "mig", text, sizeof text);
    if (error == SUCCESS) *count = (unsigned)strtoul(text, NULL, 10);
    return error;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    unsigned count;
    *current = *pending = 1;
    return nvmlDeviceGetMaxMigDeviceCount(device, &count);
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **found) {
    Device *instance = &instances[device->index][index % INSTANCES_MAX];
    char uuid[96];
    instance->index = device->index;
    snprintf(instance->prefix, sizeof instance->prefix, "%u.mig.%u", device->index, index % INSTANCES_MAX);
    if (of_device(instance, "uuid", uuid, sizeof uuid) != SUCCESS) return NOT_FOUND;
    *found = instance;
    return SUCCESS;
}

int nvmlDeviceGetName(Device *device, char *name, unsigned size) { return of_device(device, "name", name, size); }

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    char total[64], used[64];
    int error = of_device(device, "total", total, sizeof total);
    if (error == SUCCESS) error = of_device(device, "used", used, sizeof used);
    if (error != SUCCESS) return error;
    memory->total = strtoull(total, NULL, 10);
    memory->used = strtoull(used, NULL, 10);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

static int count_of(Device *device, const char *field, unsigned *value) {
    char text[64];
    int error = of_device(device, field, text, sizeof text);
    if (error == SUCCESS) *value = (unsigned)strtoul(text, NULL, 10);
    return error;
}

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
    rates->memory = 0;
    return count_of(device, "gpu", &rates->gpu);
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned *milliwatts) { return count_of(device, "power", milliwatts); }

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned *celsius) {
    (void)sensor;
    return count_of(device, "temperature", celsius);
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *processes) {
    char text[256], *rest = text, *entry;
    unsigned found = 0;
    int error = of_device(device, "processes", text, sizeof text);
    if (error != SUCCESS) return error;
    while ((entry = strsep(&rest, ",")) != NULL) {
        char *bytes = strchr(entry, ':');
        if (!*entry) continue;
        if (processes && found < *count) {
            processes[found].pid = (unsigned)atoi(entry);
            processes[found].used = bytes ? strtoull(bytes + 1, NULL, 10) : ~0ULL;
        }
        found++;
    }
    error = found > *count ? INSUFFICIENT_SIZE : SUCCESS;
    *count = found;
    return error;
}

int nvmlDeviceGetProcessUtilization(Device *device, Sample *samples, unsigned *count, unsigned long long seen) {
    char text[256], *rest = text, *entry;
    unsigned found = 0;
    int error = of_device(device, "samples", text, sizeof text);
    if (error != SUCCESS) return error;
    while ((entry = strsep(&rest, ",")) != NULL) {
        Sample sample = {0};
        if (sscanf(entry, "%llu:%u:%u", &sample.time, &sample.pid, &sample.sm) != 3 || sample.time <= seen) continue;
        if (samples && found < *count) samples[found] = sample;
        found++;
    }
    error = !found ? NOT_FOUND : found > *count ? INSUFFICIENT_SIZE : SUCCESS;
    *count = found;
    return error;
}

const char *nvmlErrorString(int error) {
    switch (error) {
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    default: return "Error of the stub";
    }
}
