// Times the CUDA kernels against a copy of the same bytes, without torch. README.md says how to build and run it.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cases.h"

#define CHECK(call)                                                                                  \
  do {                                                                                               \
    const cudaError_t error = call;                                                                  \
    if (error != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                                  \
    }                                                                                                \
  } while (false)

#define DECLARE(name) extern const Variant name;
VARIANTS(DECLARE)
#define NAME(name) &name,
static const Variant* const variants[] = {VARIANTS(NAME)};

namespace {

constexpr int kVocabulary = 32000, kRepeats = 20;
constexpr size_t kFlushBytes = size_t{256} << 20;
constexpr long long kHeadStart = 40000;  // cycles of the GPU, so that the host's time is not counted

__global__ void wait(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

template <class T>
struct Buffer {
  T* at = nullptr;
  size_t count;

  explicit Buffer(size_t count) : count(count) { CHECK(cudaMalloc(&at, bytes() + 16)); }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    CHECK(cudaMemcpy(at, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(at); }
  size_t bytes() const { return count * sizeof(T); }
  std::vector<T> read() const {
    std::vector<T> values(count);
    CHECK(cudaMemcpy(values.data(), at, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }
};

using Words = Buffer<int64_t>;
using Halves = Buffer<uint16_t>;

// A mix of its bytes: equal for equal contents.
__global__ void mix(const uint32_t* in, size_t count, unsigned long long* out) {
  unsigned long long sum = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x)
    sum += (in[i] + 1ull) * ((i * 0x9e3779b97f4a7c15ull) | 1);
  atomicAdd(out, sum);
}

template <class T>
unsigned long long digest(const Buffer<T>& buffer) {
  Buffer<unsigned long long> sum(1);
  CHECK(cudaMemset(sum.at, 0, 8));
  mix<<<512, 256>>>(reinterpret_cast<const uint32_t*>(buffer.at), buffer.bytes() / 4, sum.at);
  return sum.read()[0];
}

// Values of about 1, the same on every run.
__global__ void fill_halves(uint16_t* out, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x)
    out[i] = static_cast<uint16_t>(0x3f00 + (i * 2654435761u >> 16) % 256);
}

void fill(Halves& buffer) { fill_halves<<<1024, 256>>>(buffer.at, buffer.count); }

double median_us(char* flush, const std::function<void()>& run) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kRepeats + 2; ++i) {
    CHECK(cudaMemsetAsync(flush, i, kFlushBytes));
    wait<<<1, 1>>>(kHeadStart);
    CHECK(cudaEventRecord(start));
    run();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, start, end));
    if (i >= 2) times.push_back(1000 * ms);
  }
  CHECK(cudaGetLastError());
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(end));
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  return times[kRepeats / 2];
}

bool all_same = true;

// Times `run` of every variant in turn and compares what `result` says of the output with the first one's.
// moved: bytes that must be read and written; the copy reads and writes as many.
void compare(const std::string& kernel, const std::string& shape, size_t moved, char* flush,
             const std::function<void(const Variant&)>& run, const std::function<unsigned long long()>& result,
             const std::function<void()>& clear) {
  Buffer<char> from(moved / 2), to(moved / 2);
  const double copy =
      median_us(flush, [&] { CHECK(cudaMemcpyAsync(to.at, from.at, moved / 2, cudaMemcpyDeviceToDevice)); });
  std::printf("%s,%s,copy,%.2f,%.0f,1.00,\n", kernel.c_str(), shape.c_str(), copy, moved / copy / 1000);
  unsigned long long expected = 0;
  for (const Variant* variant : variants) {
    clear();
    run(*variant);
    CHECK(cudaDeviceSynchronize());
    const unsigned long long found = result();
    if (variant == variants[0]) expected = found;
    const bool same = found == expected;
    all_same = all_same && same;
    const double us = median_us(flush, [&] { run(*variant); });
    std::printf("%s,%s,%s,%.2f,%.0f,%.2f,%s\n", kernel.c_str(), shape.c_str(), variant->name, us, moved / us / 1000,
                copy / us, same ? "same" : "DIFFERENT");
    std::fflush(stdout);
  }
}

std::string shape_of(int prompt_length, int rows, int tokens, int dim) {
  return std::to_string(prompt_length) + "x" + std::to_string(rows) + "x" + std::to_string(tokens) + "x" +
         std::to_string(dim);
}

struct Shape {
  int prompt_length, rows, tokens, dim;
};

struct Batch {
  std::vector<int64_t> ids, mask, labels;

  explicit Batch(const Shape& s) {
    std::mt19937_64 random(1);
    for (int row = 0; row < s.rows; ++row) {
      const int length = row == 0 ? s.tokens : s.tokens - static_cast<int>(random() % (s.tokens / 8 + 1));
      for (int t = 0; t < s.tokens; ++t) {
        ids.push_back(static_cast<int64_t>(random() % kVocabulary));
        mask.push_back(t < length);
        labels.push_back(t < length ? ids.back() : -100);
      }
    }
  }
};

void time_assemble(const Shape& s, char* flush) {
  const Batch batch(s);
  Halves embedding(size_t{kVocabulary} * s.dim), prompts(size_t{2} * s.prompt_length * s.dim);
  fill(embedding);
  fill(prompts);
  const Words ids(batch.ids), mask(batch.mask), labels(batch.labels);
  const size_t slots = size_t{1} * s.rows * (s.prompt_length + s.tokens), tokens = batch.ids.size();
  const Halves vectors(slots * s.dim);
  const Words mask_out(slots), positions(slots), labels_out(slots), token_slots(tokens), prompt_slots(s.rows),
      status(5);
  for (const bool wide : {true, false}) {
    for (const bool masked : {true, false}) {
      const AssembleCase c{s.prompt_length, s.rows,          s.tokens,    s.dim,        wide,
                           kVocabulary,     embedding.at,    prompts.at,  ids.at,       masked ? mask.at : nullptr,
                           labels.at,       vectors.at,      mask_out.at, positions.at, labels_out.at,
                           token_slots.at,  prompt_slots.at, status.at};
      compare(
          std::string("assemble ") + (wide ? "fp32 prompts" : "bf16 prompts") + (masked ? " mask" : " no mask"),
          shape_of(s.prompt_length, s.rows, s.tokens, s.dim), 2 * vectors.bytes(), flush,
          [&](const Variant& v) { v.assemble(c); },
          [&] {
            return digest(vectors) + 3 * digest(mask_out) + 5 * digest(positions) + 7 * digest(labels_out) +
                   11 * digest(token_slots) + 13 * digest(prompt_slots);
          },
          [&] {
            CHECK(cudaMemset(vectors.at, 1, vectors.bytes()));
            CHECK(cudaMemset(positions.at, 1, positions.bytes()));
            CHECK(cudaMemset(token_slots.at, 1, token_slots.bytes()));
          });
    }
  }
}

void time_backward(const Shape& s, char* flush) {
  const int width = s.prompt_length + s.tokens;
  Halves grad(size_t{1} * s.rows * width * s.dim);
  fill(grad);
  std::vector<int64_t> first;
  for (int row = 0; row < s.rows; ++row) first.push_back(int64_t{row} * width);
  const Words slots(first);
  const Buffer<float> result(size_t{1} * s.prompt_length * s.dim);
  const BackwardCase c{s.prompt_length, s.rows, s.tokens, s.dim, grad.at, slots.at, result.at};
  const size_t read = size_t{2} * s.rows * s.prompt_length * s.dim;
  compare(
      "prompt_backward", shape_of(s.prompt_length, s.rows, s.tokens, s.dim), 2 * read, flush,
      [&](const Variant& v) { v.prompt_backward(c); }, [&] { return digest(result); },
      [&] { CHECK(cudaMemset(result.at, 1, result.bytes())); });
}

// Rows of `own` slots after a prefix of `prefix` slots that all of them share.
void time_packing(int rows, int prefix, int own, int heads, int size, char* flush) {
  const int width = prefix + own;
  const int64_t slots = prefix + int64_t{rows} * own;
  std::vector<int64_t> lines, places, starts;
  for (int row = 0; row < rows; ++row)
    for (const int64_t value : {int64_t{prefix} + int64_t{row} * own, int64_t{own}, int64_t{0}, int64_t{prefix}})
      lines.push_back(value);
  for (int64_t slot = 0; slot < slots; ++slot) {
    starts.push_back(static_cast<int64_t>(places.size()));
    if (slot < prefix) {
      for (int64_t row = 0; row < rows; ++row) places.push_back(row * width + slot);
    } else {
      const int64_t row = (slot - prefix) / own;
      places.push_back(row * width + prefix + (slot - prefix) % own);
    }
  }
  starts.push_back(static_cast<int64_t>(places.size()));
  const Words table(lines), held(places), first(starts);
  Halves packed(static_cast<size_t>(slots) * heads * size), unpacked(size_t{1} * rows * width * heads * size);
  const std::string shape = std::to_string(rows) + " rows " + std::to_string(prefix) + "+" + std::to_string(own) +
                            " x" + std::to_string(heads) + "x" + std::to_string(size);
  PackingCase c{rows,     width,   prefix,   heads,     size,       slots, static_cast<int64_t>(places.size()),
                table.at, held.at, first.at, packed.at, unpacked.at};
  fill(packed);
  compare(
      "unpack", shape, 2 * unpacked.bytes(), flush, [&](const Variant& v) { v.unpack(c); },
      [&] { return digest(unpacked); }, [&] { CHECK(cudaMemset(unpacked.at, 1, unpacked.bytes())); });
  fill(unpacked);
  c.from = unpacked.at;
  c.to = packed.at;
  compare(
      "pack", shape, 2 * unpacked.bytes(), flush, [&](const Variant& v) { v.pack(c); }, [&] { return digest(packed); },
      [&] { CHECK(cudaMemset(packed.at, 1, packed.bytes())); });
}

}  // namespace

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("# %s, %d multiprocessors, L2 %d MB\n", device.name, device.multiProcessorCount,
              device.l2CacheSize >> 20);
  std::printf("kernel,shape,variant,us,gb_per_s,share_of_copy,result\n");
  Buffer<char> flush(kFlushBytes);
  const double launch = median_us(flush.at, [] { wait<<<1, 1>>>(0); });
  std::printf("launch of nothing,,,%.2f,,,\n", launch);
  const Shape shapes[] = {{20, 64, 1024, 4096}, {20, 16, 1024, 4096}, {20, 4, 1024, 4096},
                          {100, 16, 128, 1024}, {20, 16, 256, 1024},  {20, 1, 64, 576}};
  for (const Shape& shape : shapes) time_assemble(shape, flush.at);
  for (const Shape& shape : shapes) time_backward(shape, flush.at);
  time_backward({512, 32, 16, 4096}, flush.at);  // 134 MB of gradients
  time_packing(64, 20, 108, 8, 128, flush.at);
  time_packing(64, 20, 1004, 8, 128, flush.at);
  std::printf("# results: %s\n", all_same ? "all the same" : "DIFFERENT");
  return all_same ? 0 : 1;
}
