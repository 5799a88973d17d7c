"""Runs untrusted programs on Linux, confined; refuses where it cannot confine them.

`start.open_sandbox` starts a sandbox: one process (`inside`) that forks a child for each program
(`programs.run_program`). Two backends, and in both the child is also under a filter of system
calls and limits (`lockdown`):

  bubblewrap  namespaces of its own for files, processes, network and the rest; of the machine's
              files it sees /usr and the Python that runs it, read-only
  landlock    the same files by landlock rules, for containers that forbid user namespaces

Programs may not write any file nor start any process; they may start threads. Before a sandbox is
handed out, a program (`canary`) has tried in it what must fail. There is no third backend: a
machine with neither gets `SandboxError`, in one line that says what to install.

Not defended against: errors in the kernel itself, and timing channels.
"""
