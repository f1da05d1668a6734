// Calls the CPU kernels, and the CUDA kernels played on a CPU, with random, hostile and boundary arguments, under a
// sanitizer. It checks as well that both write the same bytes, and that threads do not change them.
//
//   fuzz CALLS SEED   makes that many calls
//   fuzz FAULT        makes a known mistake, which the sanitizer must report: overflow, shift, race, barrier
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>

#include "../cuda_on_cpu.h"
#include "ATen/Parallel.h"
#include "cpu/kernels.h"
#include "cuda/kernels.cuh"
#include "random_params.h"

namespace fuzz {
namespace {

struct Player {
  static constexpr int max_threads() { return 64; }

  template <class Kernel, class... Values>
  void run(Kernel kernel, const cuda::Launch& launch, const Values&... values) const {
    cuda_on_cpu::play(kernel, static_cast<unsigned>(launch.blocks), static_cast<unsigned>(launch.threads), values...);
  }
};

struct Counts {
  int64_t cpu = 0, played = 0;
};

void fail(const char* kernel, const char* what) {
  std::fprintf(stderr, "%s: %s\n", kernel, what);
  std::exit(1);
}

// One CPU call, sometimes a second one with other threads, sometimes one of the CUDA kernel (null: there is none): the
// same bytes each time.
template <class Params, class Cpu, class Cuda>
void compare(const char* name, Arguments& arguments, const Params& p, Counts& counts, const Cpu& on_cpu,
             const Cuda& on_gpu, int fill = 0x55) {
  Random& random = arguments.random;
  at::num_threads() = random.once_in(8) ? static_cast<int>(random.from(2, 4)) : 1;
  on_cpu(p);
  ++counts.cpu;
  const std::vector<char> expected = arguments.take_outputs(fill);
  if (random.once_in(8)) {
    at::num_threads() = at::num_threads() == 1 ? 3 : 1;
    on_cpu(p);
    ++counts.cpu;
    if (arguments.take_outputs(fill) != expected) fail(name, "other threads, other bytes");
  }
  if constexpr (!std::is_null_pointer_v<Cuda>) {
    if (!random.once_in(8)) return;
    on_gpu(p);
    ++counts.played;
    if (arguments.take_outputs(fill) != expected && !arguments.hostile) fail(name, "other bytes from the CUDA kernel");
  }
}

int64_t some_dim(Random& random) { return random.pick<int64_t>({1, 2, 3, 4, 7, 8, 16, 33, 64, 100}); }

// Ascending offsets of prompts in `rows` rows; hostile: some of them are anything.
int64_t* offsets(Arguments& arguments, int64_t prompts, int64_t& rows) {
  int64_t* values = static_cast<int64_t*>(arguments.bytes((prompts + 1) * 8));
  values[0] = rows = 0;
  for (int64_t i = 0; i < prompts; ++i) values[i + 1] = rows += arguments.random.from(0, 5);
  if (arguments.hostile && arguments.random.once_in(2))
    for (int64_t i = 0; i <= prompts; ++i) values[i] = arguments.integer(0, rows);
  return values;
}

// On the device, or with the arguments.
Integers integers_at(Random& random, const int64_t* values, int64_t count) {
  Integers integers{};
  integers.count = count;
  if (count > kFewIntegers || random.once_in(2)) {
    integers.data = values;
  } else {
    std::copy_n(values, count, integers.few);
  }
  return integers;
}

Words mask(Arguments& arguments, AssembleParams& p) {
  Random& random = arguments.random;
  struct Kind {
    int32_t bytes;
    uint64_t one, sign;
  };
  const Kind kind = random.pick<Kind>({{1, 1, 0}, {2, 0x3c00, 0x8000}, {4, 0x3f800000, 0x80000000}, {8, 1, 0}});
  p.mask_one = kind.one;
  p.mask_sign = kind.sign;
  Words x = arguments.words(kind.bytes, p.rows, p.tokens, 0, 0);
  if (p.rows * p.tokens == 0) return x;
  const int64_t count = (p.rows - 1) * x.row_stride + (p.tokens - 1) * x.column_stride + 1;
  for (int64_t i = 0; i < count; ++i) {
    const bool other = arguments.hostile && random.once_in(4);
    write_bits(const_cast<void*>(x.data), kind.bytes, i, other ? random.bits() : random.once_in(3) ? 0 : kind.one);
  }
  return x;
}

// A plan as the op requires it on a CPU; hostile: what a GPU may find.
void make_plan(Arguments& arguments, AssembleParams& p) {
  Random& random = arguments.random;
  p.prompt_segments = p.prompt_count == 0 ? 0 : random.from(0, p.prompt_count);
  p.segments = p.prompt_segments + p.rows;
  int64_t* plan = static_cast<int64_t*>(arguments.bytes(p.segments * kPlanColumns * 8));
  for (int64_t i = 0; i < p.segments; ++i) {
    const bool text = i >= p.prompt_segments;
    const auto offset = [&](int64_t at) { return static_cast<uint64_t>(integer_at(p.prompt_offsets, at)); };
    int64_t length = text ? 0 : static_cast<int64_t>(offset(i + 1) - offset(i));
    for (int64_t t = 0; text && t < p.tokens; ++t) length += is_real(p, i - p.prompt_segments, t) ? 1 : 0;
    if (length < 0 || length > 100 || (arguments.hostile && random.once_in(4))) length = random.from(0, 7);
    const int64_t line[] = {p.slots, length, arguments.integer(-1, p.prompt_count - 1), random.from(0, 9)};
    std::copy_n(line, kPlanColumns, plan + i * kPlanColumns);
    p.slots += length;
    p.width = std::max(p.width, length);
  }
  p.plan = plan;
}

void assemble(Random& random, Counts& counts) {
  Arguments arguments(random);
  AssembleParams p{};
  p.rows = random.from(0, 4);
  p.tokens = random.from(0, 9);
  p.dim = some_dim(random);
  p.prompt_count = random.from(0, 3);
  int64_t prompt_rows;
  p.prompt_offsets = integers_at(random, offsets(arguments, p.prompt_count, prompt_rows), p.prompt_count + 1);
  const Scalar type = arguments.scalar();
  const int64_t vocabulary = random.from(1, 6);
  p.embedding = arguments.matrix(type, vocabulary, p.dim);
  p.prompts = arguments.matrix(random.once_in(2) ? type : Scalar::f32, prompt_rows, p.dim);
  p.input_ids = arguments.words(random.pick({4, 8}), p.rows, p.tokens, 0, vocabulary - 1);
  p.attention_mask = {nullptr, 8, 0, 0};
  p.mask_one = 1;
  if (random.once_in(2)) p.attention_mask = mask(arguments, p);
  if (random.once_in(2)) p.labels = arguments.words(random.pick({4, 8}), p.rows, p.tokens, -100, 100);
  p.scale = random.pick({1.0, 1.0, 0.5, -3.0});
  p.left = random.once_in(2);
  p.causal = random.once_in(2);
  p.window = random.pick<int64_t>({0, 0, 1, 2, 5, INT32_MAX, INT64_MAX});
  const bool packed = random.once_in(2);
  if (packed) {
    make_plan(arguments, p);
  } else {
    if (p.prompt_count == 0 || random.once_in(2))
      p.prompt_ids = integers_at(random, arguments.integers(p.rows, -1, p.prompt_count - 1), p.rows);
    p.width = random.once_in(4) ? random.from(0, 5) : p.tokens + 5;
    p.slots = p.rows * p.width;
    p.segments = p.rows;
    p.mask_format = static_cast<MaskFormat>(random.from(0, 3));
  }
  if (p.prompt_count > 0 && random.once_in(2)) {
    p.update_length = random.from(1, 10);
    const Scalar wide = type == Scalar::f64 ? Scalar::f64 : Scalar::f32;
    p.token_update = {nullptr, wide, p.prompt_count * p.update_length, p.dim};
    const int64_t count = p.token_update.count * p.dim;
    void* update = arguments.bytes(count * size_of(wide));
    arguments.fill(update, wide, count);
    p.token_update.data = update;
  }
  const int64_t mask_bytes = p.mask_format == MaskFormat::none          ? 0
                             : p.mask_format == MaskFormat::two_d       ? p.attention_mask.bytes
                             : p.mask_format == MaskFormat::four_d_bool ? p.width
                                                                        : p.width * size_of(type);
  p.inputs_embeds = arguments.output(p.slots * p.dim * size_of(type));
  p.mask_out = arguments.output(p.slots * mask_bytes);
  p.position_ids = static_cast<int64_t*>(arguments.output(p.slots * 8));
  p.labels_out = p.labels.data == nullptr ? nullptr : arguments.output(p.slots * p.labels.bytes);
  p.token_slots = static_cast<int64_t*>(arguments.output(p.rows * p.tokens * 8));
  p.row_ids = packed ? static_cast<int64_t*>(arguments.output(p.slots * 8)) : nullptr;
  p.prompt_slots = static_cast<int64_t*>(arguments.output((packed ? p.prompt_segments : p.rows) * 8));
  // Where rules are broken it gets the smallest index: the first bytes stand for "none" well enough.
  p.status = random.once_in(4) ? nullptr : static_cast<int64_t*>(arguments.output(kStatusSize * 8));
  if (p.segments == 0) return;
  compare("assemble", arguments, p, counts, cpu::assemble,
          [](const AssembleParams& params) { cuda::run_assemble(params, Player{}); });
  if (!packed || !arguments.hostile) return;
  int64_t* plan = arguments.integers(p.segments * kPlanColumns, 0, p.slots);
  p.plan = plan;
  cpu::assemble(p);
  cuda::run_assemble(p, Player{});
  ++counts.cpu;
  ++counts.played;
}

void prompt_backward(Random& random, Counts& counts) {
  Arguments arguments(random);
  PromptBackwardParams p{};
  p.dim = some_dim(random);
  p.uses = random.from(0, 20);
  p.prompt_count = random.from(0, 4);
  int64_t rows;
  p.prompt_offsets = integers_at(random, offsets(arguments, p.prompt_count, rows), p.prompt_count + 1);
  const Scalar type = arguments.scalar();
  p.grad = arguments.matrix(type, random.from(0, 40), p.dim);
  p.grad_prompts = arguments.output_matrix(random.once_in(2) ? type : Scalar::f32, rows, p.dim);
  p.slots = arguments.integers(p.uses, -1, p.grad.count - 1);
  if (random.once_in(2)) {
    int64_t* ids = arguments.integers(p.uses, -1, p.prompt_count - 1);
    std::sort(ids, ids + p.uses);
    p.sorted_ids = integers_at(random, ids, p.uses);
    int64_t* order = arguments.integers(p.uses, 0, 0);
    for (int64_t use = 0; use < p.uses; ++use) order[use] = p.uses - 1 - use;
    p.order = integers_at(random, order, p.uses);
  }
  if (rows == 0) return;
  compare("prompt_backward", arguments, p, counts, cpu::prompt_backward,
          [](const PromptBackwardParams& params) { cuda::run_prompt_backward(params, Player{}); });
}

void embedding_backward(Random& random, Counts& counts) {
  Arguments arguments(random);
  EmbeddingBackwardParams p{};
  p.dim = some_dim(random);
  p.tokens = random.from(1, 20);
  p.scale = random.pick({1.0, 0.5});
  const Scalar type = arguments.scalar();
  p.grad = arguments.matrix(type, random.from(0, 40), p.dim);
  p.grad_embedding = arguments.output_matrix(random.once_in(2) ? type : Scalar::f32, random.from(0, 6), p.dim, 0);
  int64_t* ids = arguments.integers(p.tokens, 0, p.grad_embedding.count);
  std::sort(ids, ids + p.tokens);
  p.sorted_ids = ids;
  p.sorted_slots = arguments.integers(p.tokens, 0, p.grad.count - 1);
  compare(
      "embedding_backward", arguments, p, counts, cpu::embedding_backward,
      [](const EmbeddingBackwardParams& params) { cuda::run_embedding_backward(params, Player{}); }, 0);
}

// Sizes that unpack and pack share.
void packing_sizes(Random& random, PackingParams& p) {
  p.rows = random.from(1, 5);
  p.width = random.from(1, 12);
  p.slots = random.from(0, 30);
  p.tensors = static_cast<int32_t>(random.from(1, kMaxTensors));
}

void unpack(Random& random, Counts& counts) {
  Arguments arguments(random);
  UnpackParams p{};
  packing_sizes(random, p);
  p.table = arguments.integers(p.rows * kTableColumns, 0, 10);
  const Scalar in = arguments.scalar(), out = arguments.partner(in);
  const int64_t heads = random.from(1, 3);
  for (int32_t i = 0; i < p.tensors; ++i) {
    const int64_t size = some_dim(random);
    p.from[i] = arguments.heads(in, 1, p.slots, heads, size);
    p.to[i] = arguments.output_heads(out, p.rows, p.width, heads, size);
  }
  compare("unpack", arguments, p, counts, cpu::unpack,
          [](const UnpackParams& params) { cuda::run_unpack(params, Player{}); });
}

void pack(Random& random, Counts& counts) {
  Arguments arguments(random);
  PackParams p{};
  packing_sizes(random, p);
  p.held = random.from(0, 60);
  p.places = arguments.integers(p.held, 0, p.rows * p.width - 1);
  int64_t* starts = arguments.integers(p.slots + 1, 0, p.held);
  if (!arguments.hostile) std::sort(starts, starts + p.slots + 1);
  p.starts = starts;
  const Scalar in = arguments.scalar(), out = arguments.partner(in);
  const int64_t heads = random.from(1, 3);
  for (int32_t i = 0; i < p.tensors; ++i) {
    const int64_t size = some_dim(random);
    p.from[i] = arguments.heads(in, p.rows, p.width, heads, size);
    p.to[i] = arguments.output_heads(out, 1, p.slots, heads, size);
  }
  compare("pack", arguments, p, counts, cpu::pack, [](const PackParams& params) { cuda::run_pack(params, Player{}); });
}

// Segments inside the tensors, as the op requires; numbers are anything.
void attention(Random& random, Counts& counts) {
  Arguments arguments(random);
  AttentionForwardParams p{};
  const int64_t heads = random.from(1, 2), group = random.pick<int64_t>({1, 1, 2, 3, 100});
  const int64_t size = random.from(0, 20), value_size = random.from(1, 20);
  const Scalar type = arguments.scalar(false);
  const int64_t longest = random.once_in(16) ? 150 : 6;
  p.segments = random.from(0, 4);
  p.scale = random.pick({0.3, 1.0, -1.0, 1e30});
  p.window = random.pick<int64_t>({0, 0, 1, 3, 200, INT64_MAX});
  const bool prefixes = random.once_in(2), cached = random.once_in(4);  // in tensors of their own; queries: the last
  const int64_t shared = random.from(0, longest);
  p.slots = prefixes ? 0 : shared;
  int64_t* table = static_cast<int64_t*>(arguments.bytes(p.segments * kTableColumns * 8));
  int64_t* queries = static_cast<int64_t*>(arguments.bytes(p.segments * 2 * 8));
  int64_t asked = 0;
  for (int64_t i = 0; i < p.segments; ++i) {
    const int64_t length = random.from(0, longest), first = random.from(0, shared);
    const int64_t line[] = {p.slots, length, first, random.from(0, shared - first)};
    std::copy_n(line, kTableColumns, table + i * kTableColumns);
    queries[2 * i] = asked;
    asked += queries[2 * i + 1] = random.from(0, length);
    p.slots += length;
  }
  p.table = table;
  if (cached) p.queries = queries;
  const int64_t query_slots = cached ? asked : p.slots;
  p.query = arguments.heads(type, 1, query_slots, heads * group, size);
  p.key = arguments.heads(type, 1, p.slots, heads, size);
  p.value = arguments.heads(type, 1, p.slots, heads, value_size);
  p.prefix_slots = prefixes ? shared : p.slots;
  p.prefix_key = prefixes ? arguments.heads(type, 1, shared, heads, size) : p.key;
  p.prefix_value = prefixes ? arguments.heads(type, 1, shared, heads, value_size) : p.value;
  p.out = arguments.output_heads(type, 1, query_slots, heads * group, value_size);
  p.log_sums = static_cast<float*>(arguments.output(query_slots * heads * group * 4));
  Counts forward, backward;
  compare("attention", arguments, p, forward, cpu::attention, nullptr);
  counts.cpu += forward.cpu;
  if (cached) return;

  Arguments gradients(random);
  AttentionBackwardParams b{static_cast<const AttentionParams&>(p)};
  b.out = gradients.heads(type, 1, p.slots, heads * group, value_size);
  b.grad_out = gradients.heads(type, 1, p.slots, heads * group, value_size);
  float* sums = static_cast<float*>(gradients.bytes(p.slots * heads * group * 4));
  gradients.fill(sums, Scalar::f32, p.slots * heads * group);
  b.log_sums = sums;
  const auto zeros = [&](int64_t count) { return static_cast<float*>(gradients.output(count * 4, 0)); };
  b.grad_query = zeros(p.slots * heads * group * size);
  b.grad_key = b.grad_prefix_key = zeros(p.slots * heads * size);
  b.grad_value = b.grad_prefix_value = zeros(p.slots * heads * value_size);
  if (prefixes) {
    b.grad_prefix_key = zeros(shared * heads * size);
    b.grad_prefix_value = zeros(shared * heads * value_size);
  }
  compare("attention_backward", gradients, b, backward, cpu::attention_backward, nullptr, 0);
  counts.cpu += backward.cpu;
}

struct Kernel {
  const char* name;
  void (*call)(Random&, Counts&);
};

constexpr Kernel kKernels[] = {{"assemble", assemble},
                               {"prompt_backward", prompt_backward},
                               {"embedding_backward", embedding_backward},
                               {"unpack", unpack},
                               {"pack", pack},
                               {"attention and its backward", attention}};
constexpr size_t kKernelCount = sizeof kKernels / sizeof *kKernels;

int run(int64_t calls, uint64_t seed) {
  Random random(seed);
  Counts counts[kKernelCount];
  int64_t made = 0;
  for (size_t turn = 0; made < calls; turn = (turn + 1) % kKernelCount) {
    Counts& mine = counts[turn];
    const int64_t before = mine.cpu + mine.played;
    kKernels[turn].call(random, mine);
    made += mine.cpu + mine.played - before;
  }
  for (size_t i = 0; i < kKernelCount; ++i)
    std::printf("%s: %lld calls, %lld of the CUDA kernel\n", kKernels[i].name, static_cast<long long>(counts[i].cpu),
                static_cast<long long>(counts[i].played));
  std::printf("%lld calls in all, nothing found\n", static_cast<long long>(made));
  return 0;
}

// --- Known mistakes ---

void lacks_a_barrier(int64_t* out) {
  __shared__ int64_t values[32];
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[31 - threadIdx.x];
}

int make_fault(const std::string& fault) {
  Random random(0);
  Arguments arguments(random);
  volatile int64_t zero = 0;
  if (fault == "overflow") {  // a row that the table gives one slot too many
    UnpackParams p{};
    p.rows = p.width = p.slots = p.tensors = 1;
    int64_t* table = static_cast<int64_t*>(arguments.bytes(kTableColumns * 8));
    std::memset(table, 0, kTableColumns * 8);
    p.table = table;
    table[kOwnLength] = 2;
    p.width = 2;
    p.from[0] = arguments.heads(Scalar::f32, 1, 1, 1, 4);
    p.to[0] = arguments.output_heads(Scalar::f32, 1, 2, 1, 4);
    p.slots = 2 + zero;  // the tensor has one
    cpu::unpack(p);
  } else if (fault == "shift") {
    return static_cast<int>((int64_t{1} << (64 + zero)) & 1);
  } else if (fault == "race") {
    int64_t sum = zero;
    at::num_threads() = 2;
    at::parallel_for(0, 2, 1, [&](int64_t first, int64_t) { sum += first; });
  } else if (fault == "barrier") {
    int64_t out[32];
    cuda_on_cpu::play(lacks_a_barrier, 1, 32, static_cast<int64_t*>(out));
  } else {
    std::fprintf(stderr, "unknown fault %s\n", fault.c_str());
  }
  return 0;
}

}  // namespace
}  // namespace fuzz

int main(int count, char** words) {
  if (count == 2) return fuzz::make_fault(words[1]);
  if (count == 3) return fuzz::run(std::atoll(words[1]), std::strtoull(words[2], nullptr, 10));
  std::fprintf(stderr, "usage: fuzz CALLS SEED | fuzz FAULT\n");
  return 2;
}
