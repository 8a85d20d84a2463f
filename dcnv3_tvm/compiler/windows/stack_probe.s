# What LLVM calls on Windows before a function with a large stack frame of rax bytes: each page is
# touched in order, because the one that follows the stack is mapped by the fault. It keeps all
# registers.
    .globl ___chkstk_ms
___chkstk_ms:
    pushq %rcx
    pushq %rax
    leaq 24(%rsp), %rcx         # The caller's stack pointer.
next:
    cmpq $0x1000, %rax
    jb last
    subq $0x1000, %rcx
    testq %rcx, (%rcx)
    subq $0x1000, %rax
    jmp next
last:
    subq %rax, %rcx
    testq %rcx, (%rcx)
    popq %rax
    popq %rcx
    ret
