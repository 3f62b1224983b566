"""The contract as a model: what every operation answers and changes, and a player that holds a real kernel against it.

steps      the operations, as data that a file of JSON lines can hold
state      what the model remembers: VMs, files, slots, processes and what they hold
rules      what each operation answers and changes
traits     in what kernels may differ, found by probing
generate   sequences of steps
world      the same steps on a real kernel
play       one sequence on both, and where they first disagree
deviations known bugs, recognised by what the kernel did
shrink     the shortest sequence that still shows a finding
"""
