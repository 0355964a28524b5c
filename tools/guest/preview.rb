# preview - what a documentation server does while its author writes: converts the document with Asciidoctor after
# each change, and keeps the last versions.
#
#   ruby preview.rb PROGRESS_FILE SEED SECONDS VERSIONS
#
# One process for ever, so that its garbage is collected.  PROGRESS_FILE holds the number of conversions.
require 'asciidoctor'

progress, seed, seconds, kept = ARGV[0], ARGV[1].to_i, ARGV[2].to_f, ARGV[3].to_i
random = Random.new(seed)
lines = File.readlines('/presync/document.md', chomp: true).first(600).map do |line|
  line.start_with?('## ') ? "\n#{line.tr('#', '=')}\n" : line
end
words = lines.join(' ').split.uniq
versions = []
due = Process.clock_gettime(Process::CLOCK_MONOTONIC)
(1..).each do |count|
  (1 + random.rand(4)).times do
    at = random.rand(lines.size)
    next if lines[at].include?('==')
    lines[at] = Array.new(6 + random.rand(8)) { words.sample(random: random) }.join(' ')
  end
  first = 40 * random.rand(10)  # the part that is looked at
  versions << Asciidoctor.convert(lines[first, 200].join("\n"), safe: :safe, standalone: true)
  versions.shift if versions.size > kept
  File.write(progress, "#{count}\n")
  due += seconds
  wait = due - Process.clock_gettime(Process::CLOCK_MONOTONIC)
  wait > 0 ? sleep(wait) : due -= wait
end
