// SPDX-License-Identifier: Apache-2.0
/// Text in three languages from Debian packages: the King James Bible (bible-kjv) and the prose of the French and German
/// manual pages (manpages-fr, manpages-de).
#pragma once

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "roff.hpp"
#include "text.hpp"

namespace demo {

struct corpus {
  static constexpr std::array<const char*, 3> languages = {"English", "French", "German"};
  text train, valid;
};

/// The packages that hold the text are not installed.
struct missing_corpus : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace detail {

/// The lines a command prints, until it ends or `line` returns false.
template <class Line>
void read_command(const std::string& command, Line line) {
  const auto close = [](std::FILE* f) { pclose(f); };
  const std::unique_ptr<std::FILE, decltype(close)> pipe(popen(command.c_str(), "r"), close);
  if (!pipe) throw std::runtime_error("cannot run: " + command);
  std::string current;
  for (int c; (c = std::fgetc(pipe.get())) != EOF;) {
    if (c != '\n') {
      current += static_cast<char>(c);
    } else {
      if (!line(std::string_view(current))) return;
      current.clear();
    }
  }
}

/// One verse a line, without its reference ("Ge1:1 ").
inline std::string bible(std::size_t size) {
  std::string out;
  read_command("bible -f ge1:1-re22:21 2>/dev/null", [&](std::string_view verse) {
    out += verse.substr(verse.find(' ') + 1);
    out += '\n';
    return out.size() < size;
  });
  return out;
}

/// Prose of the manual pages of one language, section by section, each in the order of its file names.
inline std::string manual(const std::string& language, std::size_t size) {
  namespace fs = std::filesystem;
  roff_text out;
  for (const char* section : {"man7", "man8", "man1", "man5"}) {
    const fs::path folder = fs::path("/usr/share/man") / language / section;
    std::vector<std::string> pages;
    std::error_code none;
    for (const auto& entry : fs::directory_iterator(folder, none))
      if (!entry.is_symlink() && entry.path().extension() == ".gz") pages.push_back(entry.path().string());
    std::sort(pages.begin(), pages.end());
    for (const std::string& page : pages) {
      if (out.text().size() >= size) return out.text();
      read_command("gzip -dc '" + page + "'", [&](std::string_view line) {
        out.line(line);
        return true;
      });
      out.end_paragraph();
    }
  }
  return out.text();
}

/// Appends one language: two pieces of its text, a `parts`-th of it, are for validation, the rest for training.
inline void split(std::string_view all, std::size_t parts, corpus& to) {
  const std::size_t piece = all.size() / (2 * parts);
  std::string train, valid;
  for (std::size_t i = 0; i < 2 * parts; ++i) (i % parts == parts / 2 ? valid : train) += all.substr(i * piece, piece);
  append_language(to.train, train);
  append_language(to.valid, valid);
}

}  // namespace detail

/// `size` bytes of each language, the same on every machine with the same packages. Two pieces of each, a
/// `validation_parts`-th of it, are kept from training.
inline corpus load_corpus(std::size_t size, std::size_t validation_parts = 20) {
  const std::array<std::string, 3> texts = {detail::bible(size), detail::manual("fr", size), detail::manual("de", size)};
  corpus out;
  for (std::size_t l = 0; l < texts.size(); ++l) {
    if (texts[l].size() < size)
      throw missing_corpus(std::string(corpus::languages[l]) + " text has " + std::to_string(texts[l].size()) +
                           " bytes, expected " + std::to_string(size) +
                           ": install the packages bible-kjv, bible-kjv-text, manpages-fr and manpages-de");
    detail::split(std::string_view(texts[l]).substr(0, size), validation_parts, out);
  }
  return out;
}

}  // namespace demo
