// SPDX-License-Identifier: Apache-2.0
#include "support/options.hpp"

#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <string_view>
#include <utility>

namespace bench {

const char* const usage = R"(usage: benchmarks/run [flags]

Measures the limits of the machine, then whole layers (gate, softmax over the k best, gated experts, weighted sum) beside
other implementations of them, all in turn in one process; prints medians.

  --shape SHAPE     S1, S2, S3, S4, or d=2048,f=768,E=128,k=8 (k from 1 to 32, at most E); may be repeated.
                    Default: S1 to S4
  --tokens LIST     tokens of a call. Default: 1,4,32,128,512,2048
  --type LIST       types of weights: f32, bf16, f16, int8, int4, ternary. Default: all that there are
  --threads LIST    Default: as many as there are cores
  --skew LIST       how uneven the routing is. 0: every expert is chosen equally often. S: the chance that a token chooses an
                    expert is proportional to rank^-S, where the experts' ranks are shuffled anew for every call, and no chance
                    is above 1: what the first would have above it goes to the others in proportion. A bias on the scores
                    makes it so; every peer gets the same scores. Default: 0
  --backward        a training step without its optimizer: forward, then all gradients, beside one by hand with Eigen in float32
  --static          instead of these: a static layer (d 32, f 64, E 4, k 1), the expert changing at every call, in nanoseconds;
                    its roof is the time to read an expert's weights from the second cache
  --attention SHAPE instead of layers: causal attention, h=32,hkv=8,d=128,m=512,n=4096, the last m of n positions being queries;
                    may be repeated. --type is then that of queries, keys and values, and these flags ask for other forms, also
                    together:
      --moba B=128,k=8     blocks of B keys, k of them a query (MoBA), beside dense attention and the same blocks without
                           choosing them
      --gate KIND          headwise or elementwise on the output, without its projection, beside the same form ungated
      --backward           all gradients, without forward, beside forward
      --decode             one query on n keys in a cache, also of int8, going round --rotate MiB of caches; with --moba, on
                           the blocks that each of its heads chooses. Not with --backward: decoding keeps nothing to
                           differentiate
  --json FILE       writes every row as JSON, too
  --plot FOLDER     draws roofline.svg and ratios.svg
  --peers           also ONNX Runtime, PyTorch, llama.cpp and kt-kernel, which benchmarks/peers installs into the build folder
                    (several gigabytes the first time) and drives in processes of their own; they are handed the routing. ik_llama.cpp
                    is one more where MOE_IK_GGML names a build of it (benchmarks/peers/install.py --help). What cannot be
                    installed or does not run here is named with the reason. None of them trains: with --backward
                    none is installed
  --peer-list FILE  peers in processes of their own, as benchmarks/peers/peer_list.hpp has it
  --rounds N        turns that each implementation gets, each of about 10 ms, or one call. Default: 15. Fewer: also less time
                    for the limits
  --rotate MIB      weights of other layers that are used before those of a layer come again. Default: 1024. With less, what is
                    measured is a cache
  --help

The roof of a row is what the machine's measured limits allow: the weights of the experts that are used, the router, x and y
moved once at the speed of memory, or the multiply-adds of the experts at the peak of the unit of that type, whichever takes
longer. A training step moves the weights twice, for forward and for backward, and writes the gradients of all experts once.
Operations of attention are those of pairs of a query and a key that it sees, 4 d for each head, and 2.5 times as many for
gradients.
A turn counts where nobody else slowed the processor down right before and right after it; each implementation waits for such
moments, 0.2 s a turn at most. A `!` marks a row where one of them had fewer than three: there all turns count. It marks limits
of which one was not reached again at other times.
)";

namespace {

[[noreturn]] void refuse(std::string_view flag, std::string_view came, std::string_view wanted) {
  throw usage_error(std::string(flag) + ": \"" + std::string(came) + "\", expected " + std::string(wanted));
}

std::vector<std::string_view> split(std::string_view text, char at) {
  std::vector<std::string_view> parts;
  for (std::size_t end; (end = text.find(at)) != text.npos; text.remove_prefix(end + 1)) parts.push_back(text.substr(0, end));
  parts.push_back(text);
  return parts;
}

/// A whole number of at least 1; `text` may be a part of `came`.
dim whole(std::string_view flag, std::string_view text, std::string_view came) {
  dim n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc() || end != text.data() + text.size() || n < 1 || n > (1 << 24))
    refuse(flag, came, "whole numbers from 1 to 16777216");
  return n;
}
double exponent(std::string_view flag, std::string_view text, std::string_view came) {
  double v = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), v);
  if (error != std::errc() || end != text.data() + text.size() || !(v >= 0 && v <= 10))
    refuse(flag, came, "numbers from 0 to 10");
  return v;
}

/// Every field once, by its name, as in h=32,hkv=8.
void named_numbers(std::string_view flag, std::string_view text, std::string_view wanted,
                   std::initializer_list<std::pair<std::string_view, dim*>> fields) {
  for (const std::string_view part : split(text, ',')) {
    const std::size_t at = part.find('=');
    dim* to = nullptr;
    for (const auto& [name, field] : fields)
      if (at != part.npos && part.substr(0, at) == name) to = field;
    if (to == nullptr || *to != 0) refuse(flag, text, wanted);
    *to = whole(flag, part.substr(at + 1), part);
  }
  for (const auto& field : fields)
    if (*field.second == 0) refuse(flag, text, wanted);
}

/// One of the named shapes, or d=,f=,E=,k=.
model_shape shape_of(std::string_view text) {
  constexpr std::string_view wanted = "S1, S2, S3, S4 or d=2048,f=768,E=128,k=8";
  for (const model_shape& s : named_shapes())
    if (s.name == text) return s;
  model_shape s;
  named_numbers("--shape", text, wanted, {{"d", &s.d}, {"f", &s.f}, {"E", &s.experts}, {"k", &s.k}});
  if (const dim most = std::min<dim>(most_choices, s.experts); s.k > most)
    refuse("--shape", "k=" + std::to_string(s.k), "k from 1 to " + std::to_string(most) + (most == s.experts ? " (E)" : ""));
  for (const auto& [letter, n] : {std::pair{'d', s.d}, {'f', s.f}, {'E', s.experts}, {'k', s.k}})
    s.name.append(1, letter).append(std::to_string(n));
  return s;
}

attention_shape attention_of(std::string_view text) {
  constexpr std::string_view wanted = "h=32,hkv=8,d=128,m=512,n=4096, where h is a multiple of hkv and m is at most n";
  attention_shape s;
  named_numbers("--attention", text, wanted, {{"h", &s.h}, {"hkv", &s.h_kv}, {"d", &s.d}, {"m", &s.m}, {"n", &s.n}});
  if (s.h % s.h_kv != 0 || s.m > s.n) refuse("--attention", text, wanted);
  return s;
}
void blocks_of(std::string_view text, attention_form& form) {
  named_numbers("--moba", text, "B=128,k=8", {{"B", &form.block}, {"k", &form.k}});
}
attention_gate gate_of(std::string_view text) {
  if (text != "headwise" && text != "elementwise") refuse("--gate", text, "headwise or elementwise");
  return text == "headwise" ? attention_gate::headwise : attention_gate::elementwise;
}
void check_form(const options& o) {
  const bool gated = o.form.gate != attention_gate::none;
  if (o.attention.empty() && (gated || o.form.block > 0 || o.form.decode))
    throw usage_error(std::string(o.form.decode ? "--decode" : gated ? "--gate" : "--moba") + " wants --attention beside it");
  if (o.form.decode && o.backward) throw usage_error("--decode wants no --backward beside it: it keeps nothing to differentiate");
}

weight_type type_of(std::string_view text, const std::vector<weight_type>& types) {
  std::string names;
  for (const weight_type& t : types) {
    if (t.name == text) return t;
    names.append(names.empty() ? "" : ", ").append(t.name);
  }
  refuse("--type", text, names);
}

}  // namespace

options parse(int argc, char** argv, const std::vector<weight_type>& types, int cores) {
  options o;
  const std::vector<std::string_view> words(argv + 1, argv + argc);
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string_view flag = words[i];
    if (flag == "--help" || flag == "-h") o.help = true;
    else if (flag == "--backward") o.backward = true;
    else if (flag == "--static") o.fixed = true;
    else if (flag == "--decode") o.form.decode = true;
    else if (flag == "--shape" || flag == "--tokens" || flag == "--type" || flag == "--threads" || flag == "--skew" ||
             flag == "--json" || flag == "--peer-list" || flag == "--rounds" || flag == "--rotate" || flag == "--attention" ||
             flag == "--moba" || flag == "--gate") {
      if (i + 1 == words.size()) throw usage_error(std::string(flag) + " lacks its value");
      const std::string_view value = words[++i];
      if (flag == "--shape") o.shapes.push_back(shape_of(value));
      else if (flag == "--attention") o.attention.push_back(attention_of(value));
      else if (flag == "--moba") blocks_of(value, o.form);
      else if (flag == "--gate") o.form.gate = gate_of(value);
      else if (flag == "--json") o.json = value;
      else if (flag == "--peer-list") o.peer_list = value;
      else if (flag == "--rotate") o.rotate = static_cast<double>(whole(flag, value, value)) * (1 << 20);
      else if (flag == "--rounds") o.rounds = static_cast<int>(whole(flag, value, value));
      else
        for (const std::string_view part : split(value, ',')) {
          if (flag == "--tokens") o.tokens.push_back(whole(flag, part, value));
          else if (flag == "--threads") o.threads.push_back(static_cast<int>(whole(flag, part, value)));
          else if (flag == "--type") o.types.push_back(type_of(part, types));
          else o.skews.push_back(exponent(flag, part, value));
        }
    } else {
      throw usage_error("there is no flag " + std::string(flag));
    }
  }
  o.form.backward = o.backward;
  check_form(o);
  if (o.shapes.empty()) o.shapes.assign(named_shapes().begin(), named_shapes().end());
  if (o.tokens.empty()) o.tokens.assign(default_tokens.begin(), default_tokens.end());
  if (o.types.empty()) o.types = types;
  if (o.threads.empty()) o.threads = {cores};
  if (o.skews.empty()) o.skews = {0};
  return o;
}

}  // namespace bench
