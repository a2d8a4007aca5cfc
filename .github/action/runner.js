'use strict'
// What an action says to its runner: the environment files, and commands on standard output. No dependencies.

const crypto = require('node:crypto')
const fs = require('node:fs')
const path = require('node:path')
const { spawnSync } = require('node:child_process')

function input (name) {
  return (process.env[`INPUT_${name.replace(/ /g, '_').toUpperCase()}`] || '').trim()
}

function append (file, name, value) {
  const to = process.env[file]
  if (!to) return
  // A value may have any lines: what ends it is not to be guessed.
  const end = `end-${crypto.randomUUID()}`
  fs.appendFileSync(to, `${name}<<${end}\n${value}\n${end}\n`)
}

const escaped = (text) => String(text).replace(/%/g, '%25').replace(/\r/g, '%0D').replace(/\n/g, '%0A')

const JOB_SECONDS = 86400 // for which a job is believed to go on, if it never says that it has ended

// Never throws: { status, stdout, stderr }
function run (command, args, options = {}) {
  const done = spawnSync(command, args, { encoding: 'utf8', timeout: 600000, ...options })
  return { status: done.error ? 127 : done.status, stdout: done.stdout || '', stderr: done.error ? String(done.error) : done.stderr || '' }
}

module.exports = {
  input,
  run,
  // The command, as the same.
  p2pcache: (python, args, options) => run(python, ['-m', 'httpx_p2pcache.cli', ...args], options),
  addPath: (directory) => { if (process.env.GITHUB_PATH) fs.appendFileSync(process.env.GITHUB_PATH, `${directory}\n`) },
  // The jobs of this machine that use the daemon of a CACHE_DIR: a file each.
  jobs (directory) {
    const kept = path.join(directory, 'jobs')
    const names = fs.existsSync(kept) ? fs.readdirSync(kept).filter(name => name !== 'started') : []
    return names.filter(name => Date.now() - fs.statSync(path.join(kept, name)).mtimeMs < JOB_SECONDS * 1000)
  },
  exportVariable (name, value) {
    process.env[name] = value
    append('GITHUB_ENV', name, value)
  },
  setOutput: (name, value) => append('GITHUB_OUTPUT', name, value),
  saveState: (name, value) => append('GITHUB_STATE', name, value),
  state: (name) => process.env[`STATE_${name}`] || '',
  mask: (value) => { if (value) process.stdout.write(`::add-mask::${escaped(value)}\n`) },
  warn: (text) => process.stdout.write(`::warning title=httpx-p2pcache::${escaped(text)}\n`),
  say: (text) => process.stdout.write(`${text}\n`)
}
